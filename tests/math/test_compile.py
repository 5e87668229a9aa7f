"""torch.compile: which parts of the model are one graph, and when they are compiled anew."""
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from train_gpt import Schedule, build_model

CPU = torch.device("cpu")


def graphs_after_each_call(recipe, steps):
    """The number of graphs of GPT.body that were compiled after a training and a validation forward
    pass at each step. fullgraph=True makes a graph break an error."""
    torch._dynamo.reset()
    model = build_model(recipe, CPU, torch.float32, flex=False)
    counter = CompileCounter()
    model.body = torch.compile(model.body, backend=counter, dynamic=False, fullgraph=True)
    text = torch.randint(256, (1, 257), generator=torch.Generator().manual_seed(0))
    counts = []
    for step in steps:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                model(text[:, :-1], text[:, 1:].clone(), Schedule(step, recipe, CPU))
            counts.append(counter.frame_count)
    return counts


def test_the_body_is_one_graph_that_serves_all_steps_of_a_stage(recipe):
    """The last stage: one graph for training and one for validation, also at the next step, where
    the schedule's numbers are others."""
    assert graphs_after_each_call(recipe, (12, 13)) == [1, 2, 2, 2]


@pytest.mark.slow
def test_the_body_is_one_graph_in_each_stage(recipe):
    """A stage compiles a new graph only for a new softmax_size or a new number of targets. All
    validations share one graph."""
    counts = graphs_after_each_call(recipe, (0, 4, 8, 11, 12, 14))
    assert counts == [1, 2, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5]
