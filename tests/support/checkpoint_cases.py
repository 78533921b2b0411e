"""Checkpoints that tests save, damage and compare."""

import torch

from fastvid.checkpoints import checkpoint


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(6, 3, generator=generator), "bias": torch.randn(5, generator=generator)}


def save_step(folder, step, **options):
    return checkpoint.save(folder, step, groups={"model": tensors_of(step)}, state={"step": step}, **options)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Damage


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
