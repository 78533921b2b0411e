"""The schedule against the reference's recordings; AdamW, clipping and the latch against torch's plain ones."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastvid.training import optimizer as optim
from fastvid.training.optimizer import Optimizer, learning_rate


def settings(**changed):
    return SimpleNamespace(
        **{
            **{
                "optim": "adamw",
                "learning_rate": 1e-2,
                "weight_decay": 0.1,
                "adam_beta1": 0.9,
                "adam_beta2": 0.999,
                "adam_epsilon": 1e-8,
                "max_grad_norm": 1.0,
                "seed": 42,
                "gradient_accumulation_steps": 1,
            },
            **changed,
        }
    )


def parameters(seed=0):
    torch.manual_seed(seed)
    return {
        "weight": torch.nn.Parameter(torch.randn(7, 5)),
        "bias": torch.nn.Parameter(torch.randn(7)),
        "table": torch.nn.Parameter(torch.randn(16, 256)),
    }


def give_gradients(parameters, scale=1.0):
    for p in parameters.values():
        p.grad = torch.randn_like(p) * scale


def test_cosine_schedule_equals_the_recordings(golden):
    recorded = json.loads((golden / "order.json").read_text())["lr_schedule"]
    for name, table in recorded.items():
        total, ratio = (float(part.split("=")[1]) for part in name.split(","))
        warmup = math.ceil(total * ratio)
        assert warmup == table["warmup_steps"]
        for step, lr in table["lr_used_at_update"].items():
            found = learning_rate(int(step), peak=2e-5, total_steps=int(total), warmup_steps=warmup, schedule="cosine")
            assert found == pytest.approx(lr, abs=1e-18, rel=1e-12), (name, step)


@pytest.mark.parametrize(
    "schedule, ours, theirs",
    [
        ("linear", {}, {}),
        ("constant", {}, {}),
        ("cosine", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("cosine_with_min_lr", {"min_ratio": 0.1}, {"min_lr_rate": 0.1}),
        (
            "warmup_stable_decay",
            {"min_ratio": 0.1, "decay_steps": 6},
            {"min_lr_ratio": 0.1, "num_decay_steps": 6, "num_stable_steps": 15},
        ),
        ("warmup_stable_decay", {"decay_steps": 0}, {"num_decay_steps": 0, "num_stable_steps": 21}),
        ("warmup_stable_decay", {"decay_steps": 25}, {"num_decay_steps": 25, "num_stable_steps": -4}),
    ],
)
def test_schedules_equal_those_of_transformers(schedule, ours, theirs):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    total = None if schedule == "warmup_stable_decay" else 25
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=4, num_training_steps=total, scheduler_specific_kwargs=theirs
    )
    settings = {"peak": 3e-4, "total_steps": 25, "warmup_steps": 4, "schedule": schedule, **ours}
    for step in range(25):
        ours = learning_rate(step, **settings)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e3])
def test_step_equals_torch_clipping_and_adamw(max_norm):
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours.items(), settings(max_grad_norm=max_norm), torch.device("cpu"))
    plain = torch.optim.AdamW(
        [
            {"params": [theirs["weight"], theirs["table"]], "weight_decay": 0.1},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        foreach=False,
    )
    for step in range(6):
        torch.manual_seed(step)
        give_gradients(ours)
        for name, p in ours.items():
            theirs[name].grad = p.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm or math.inf)
        for group in plain.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        plain.step()
        _, norm = optimizer.step(step, 1e-2 / (step + 1), torch.tensor(1.0))
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        for name, p in ours.items():
            torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-7)
            assert p.grad is None


class Launches(TorchDispatchMode):
    """Counts torch's operations, each of which is at least one launch on a GPU; views are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_vectors_of_any_number_take_one_launch_on_a_gpu(monkeypatch):
    """Beside 8-bit matrices, whose bits do not depend on sharding either."""
    monkeypatch.setattr(optim, "on_gpu", lambda tensor: True)
    counts = []
    for number in (1, 50):
        vectors = {f"norm{i}": torch.nn.Parameter(torch.ones(77)) for i in range(number)}
        optimizer = Optimizer(vectors.items(), settings(optim="adamw_8bit"), torch.device("cpu"))
        give_gradients(vectors)
        with Launches() as launches:
            optimizer.step(0, 1e-2, torch.tensor(1.0))
        counts.append(launches.count)
        assert all((vector != 1).all() for vector in vectors.values())
    assert counts[0] == counts[1] < 40


def test_a_bf16_matrix_takes_one_kernel_on_a_gpu(monkeypatch):
    monkeypatch.setattr(optim, "on_gpu", lambda tensor: True)
    kernels, others = [], []
    monkeypatch.setattr(optim, "adamw_step", lambda param, *rest, **options: kernels.append(param))
    for number in (1, 20):
        matrices = {f"matrix{i}": torch.nn.Parameter(torch.ones(70, 100, dtype=torch.bfloat16)) for i in range(number)}
        optimizer = Optimizer(matrices.items(), settings(), torch.device("cpu"))
        give_gradients(matrices)
        with Launches() as launches:
            optimizer.step(0, 1e-2, torch.tensor(1.0))
        others.append(launches.count)
        assert all(state["step"] == 1 for state in optimizer.rules[0].state.values())
    assert len(kernels) == 1 + 20 and others[0] == others[1] < 40


@pytest.mark.parametrize("first_rows", [0, 3])
def test_the_kernel_of_a_gpu_steps_as_the_chunks_of_a_cpu(monkeypatch, first_rows):
    """bf16 weights with 32-bit moments, on a shard; up to where rounded sums lie at the edge of the random bits."""
    ends = []
    for on_gpu in (False, True):
        monkeypatch.setattr(optim, "on_gpu", lambda tensor: on_gpu)
        weight = torch.nn.Parameter(parameters()["table"].detach().bfloat16())
        optimizer = Optimizer([("weight", weight)], settings(), torch.device("cpu"))
        optimizer.rules[0].pieces["weight"] = replace(optimizer.rules[0].pieces["weight"], first=first_rows * 101)
        for step in range(3):
            torch.manual_seed(step)
            weight.grad = torch.randn_like(weight)
            optimizer.step(step, 1e-2, torch.tensor(1.0))
        ends.append({"weight": weight.detach(), **optimizer.state_tensors()})
    chunks, kernel = ends
    assert (chunks["weight"] != kernel["weight"]).float().mean() < 1e-3
    for name, tensor in chunks.items():
        torch.testing.assert_close(kernel[name], tensor, rtol=2**-7 if name == "weight" else 1e-5, atol=1e-7)


@pytest.mark.parametrize("fault", ["gradient", "infinite gradient", "loss"])
@pytest.mark.parametrize(
    "optim, dtype",
    [
        ("adamw", torch.float32),
        ("adamw", torch.bfloat16),
        ("adamw_8bit", torch.float32),
        ("adamw_8bit", torch.bfloat16),
    ],
)
def test_latch_keeps_everything_from_the_first_non_finite_step_on(fault, optim, dtype):
    ours = {name: torch.nn.Parameter(p.detach().to(dtype)) for name, p in parameters().items()}
    optimizer = Optimizer(ours.items(), settings(optim=optim), torch.device("cpu"))
    for step in range(3):
        give_gradients(ours)
        optimizer.step(step, 1e-2, torch.tensor(1.0))
    kept = {name: p.detach().clone() for name, p in ours.items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    for step in range(3, 6):  # the steps after the bad one are finite again, and change nothing
        give_gradients(ours)
        bad = step == 3
        if bad and fault != "loss":
            ours["bias"].grad[2] = ours["table"].grad[3, 7] = math.nan if fault == "gradient" else math.inf
        optimizer.step(step, 1e-2, torch.tensor(math.nan if bad and fault == "loss" else 1.0))
    assert optimizer.failed_step.item() == 3
    assert all(torch.equal(p, kept[name]) for name, p in ours.items())
    after = optimizer.state_tensors()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_state_tensors_of_a_fresh_optimizer_take_a_saved_state(optim):
    ours, copy = parameters(), parameters()
    optimizer, fresh = (Optimizer(p.items(), settings(optim=optim), torch.device("cpu")) for p in (ours, copy))
    for step in range(3):
        give_gradients(ours)
        optimizer.step(step, 1e-2, torch.tensor(1.0))
    for name, tensor in fresh.state_tensors().items():
        tensor.copy_(optimizer.state_tensors()[name])
    with torch.no_grad():
        for name, p in copy.items():
            p.copy_(ours[name])
    give_gradients(ours)
    for name, p in copy.items():
        p.grad = ours[name].grad.clone()
    for chosen in (optimizer, fresh):
        chosen.step(3, 1e-2, torch.tensor(1.0))
    assert all(torch.equal(ours[name], copy[name]) for name in ours)
