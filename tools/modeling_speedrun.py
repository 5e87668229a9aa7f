"""The model of train_gpt.py, the file beside this one, as a model of Hugging Face's transformers.

tools/export.py copies this file into the folders that it writes. There it is loaded by
AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).
"""
import sys

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .train_gpt import Hyperparameters, Schedule, build_model

# The script makes tables of the vocabulary file. Here they are read with the weights, so the
# model can be built with any vocabulary of that size.
sys.modules[build_model.__module__].read_vocabulary = lambda track: (b"",) * track.vocab_size


class SpeedrunConfig(PretrainedConfig):
    """hyperparameters: those of the run; step: of its last validation, for the schedule.
    activations: their dtype. from_pretrained(DIR, activations="float32") changes it."""
    model_type = "gpt_speedrun"

    def __init__(self, hyperparameters: dict | None = None, step: int = 0,
                 activations: str = "float32", **kwargs):
        self.hyperparameters = hyperparameters or {}
        self.step = step
        self.activations = activations
        super().__init__(**kwargs)


class SpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """The model at the end of its run. It has no cache of keys and values."""
    config_class = SpeedrunConfig

    def __init__(self, config: SpeedrunConfig):
        super().__init__(config)
        hp = Hyperparameters(**config.hyperparameters)
        dtype = getattr(torch, config.activations)
        with torch.random.fork_rng():  # build_model sets the seed
            self.model = build_model(hp, torch.get_default_device(), dtype, flex=False)
        for module in self.modules():
            module._non_persistent_buffers_set.clear()  # tools/export.py saves all buffers
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
                labels: torch.Tensor | None = None, **kwargs) -> CausalLMOutput:
        """input_ids (B, T); a document begins at each end-of-text token, and each row begins one.
        attention_mask (B, T): 0 for padding, anywhere in the row; the logits there mean nothing.
        Returns logits (B, T, V), float32: logarithms of probabilities. labels (B, T): the
        input_ids, -100 where no loss is wanted; they are shifted here."""
        order = None
        if attention_mask is not None and not attention_mask.all():
            # Padding moves to the end of its row. No token sees it there, as the mask is causal.
            order = attention_mask.ne(0).int().argsort(dim=1, descending=True, stable=True)
            input_ids = input_ids.gather(1, order)
        schedule = Schedule(self.config.step, self.model.hp, input_ids.device)
        logits = self.model(input_ids, None, schedule).view(*input_ids.shape, -1)
        if order is not None:
            place = order.argsort(dim=1)[..., None].expand_as(logits)
            logits = logits.gather(1, place)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
