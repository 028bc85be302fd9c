"""What an optimizer keeps beside the weights, as plans count it, against the optimizers themselves."""

import pytest
import torch

from fitune.config.optimizers import numbers_per_weight, optimizer_arguments

WEIGHTS = (3, 5)


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"optim": "adamw_torch"}),
        (torch.optim.SGD, {"optim": "sgd"}),
        (torch.optim.SGD, {"optim": "sgd", "optim_args": "momentum=0.9"}),
        (torch.optim.RMSprop, {"optim": "rmsprop"}),
        (torch.optim.RMSprop, {"optim": "rmsprop", "optim_args": "momentum=0.9,centered=true"}),
        (torch.optim.Adagrad, {"optim": "adagrad"}),
    ],
)
def test_numbers_per_weight_are_those_that_the_optimizer_keeps(kind, training):
    options = optimizer_arguments(training)
    options = {name: value == "true" if name == "centered" else float(value) for name, value in options.items()}
    weight = torch.ones(WEIGHTS, requires_grad=True)
    optimizer = kind([weight], lr=0.1, **options)
    weight.sum().backward()
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if getattr(value, "shape", ()) == WEIGHTS]
    assert numbers_per_weight(training) == len(kept)
