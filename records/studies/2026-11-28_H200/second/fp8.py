import torch, statistics
T,D,V=49152,768,50304
torch.manual_seed(0)
x=torch.randn(T,D,device='cuda').bfloat16(); w=(torch.randn(V,D,device='cuda')*.02).bfloat16(); g=(torch.randn(T,V,device='cuda')*1e-3).bfloat16()
one=torch.ones((),device='cuda'); E4,E5=torch.float8_e4m3fn,torch.float8_e5m2
def bench(name,f):
    try:
        for _ in range(3): f()
        ts=[]
        for _ in range(15):
            a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
        print(f"{name:40s} {statistics.median(ts):.3f} ms", flush=True)
    except Exception as e: print(name, type(e).__name__, str(e)[:200], flush=True)
bench("bf16 forward x w^T",lambda:x@w.T)
bench("bf16 dX g w",lambda:g@w)
bench("bf16 dW g^T x",lambda:g.T@x)
mm=torch._scaled_mm
x8,w8,g8=x.to(E4),(w*10).to(E4),(g*1e3).to(E5)
w8c=w8.T.contiguous().T
bench("fp8 forward",lambda:mm(x8,w8.T,scale_a=one,scale_b=one,out_dtype=torch.bfloat16,use_fast_accum=True))
bench("fp8 dX (w8 transposed ready)",lambda:mm(g8,w8c,scale_a=one,scale_b=one,out_dtype=torch.bfloat16,use_fast_accum=False))
bench("fp8 dX fast accum",lambda:mm(g8,w8c,scale_a=one,scale_b=one,out_dtype=torch.bfloat16,use_fast_accum=True))
xt=x8.T.contiguous(); gt=g8.T.contiguous().T
bench("fp8 dW (transposed ready)",lambda:mm(xt,gt,scale_a=one,scale_b=one,out_dtype=torch.float32,use_fast_accum=False))
bench("transpose g8",lambda:g8.T.contiguous())
bench("cast x",lambda:x.to(E4)); bench("cast w",lambda:w.to(E4)); bench("transpose w8",lambda:w8.T.contiguous())
ref=x.float()[:512]@w.float().T
out=mm(x8,w8.T,scale_a=one,scale_b=one/10,out_dtype=torch.bfloat16,use_fast_accum=True)[:512].float()
print("rel error forward", ((out-ref).norm()/ref.norm()).item())
