"""A run to export, for tests of exports."""

from dataclasses import asdict

import pytest
import torch
from weight_folders import C, D, llava_state, load, write_folder

from fastvid.batch import AttentionLayout, PackedBatch
from fastvid.checkpoints import checkpoint
from fastvid.config import TrainConfig
from fastvid.config.policy import Trainable
from fastvid.data.tokenizer import load_tokenizer

PIECES = 300
ADAPTER = Trainable(projector=True, boundary=True)
ALL = Trainable(projector=True, embed=True, head=True, decoder=True)


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    """A small LLaMA-like tokenizer.model."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: what is it? ASSISTANT: a red cat </s>"] * 20),
        model_prefix=str(prefix),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def run(tmp_path, tokenizer_model):
    """make(trained, …) -> (checkpoint folder, model after training, tokenizer): a base folder and a run from it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=C, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
        )
    ).save_pretrained(tmp_path / "tower")

    def make(trainable, *, kind="mlp2x_gelu", tied=False, start_end=True, dtype=torch.float32, **flags):
        rows = load_vocabulary(tokenizer_model)
        state = {
            name: torch.randn(rows, D).to(dtype) if tensor.shape == (40, D) else tensor
            for name, tensor in llava_state(kind, dtype, tied).items()
        }
        config = {
            "model_type": "llava",
            "hidden_size": D,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": rows,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256,
            "mm_hidden_size": C,
            "mm_projector_type": kind,
            "mm_vision_tower": str(tmp_path / "tower"),
            "tie_word_embeddings": tied,
        }
        base = write_folder(tmp_path / "base", state, config, files=2)
        (base / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
        tokenizer = load_tokenizer(base, start_end)
        model = load(base, tokens=tokenizer.tokens, trainable=trainable, seed=5)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trained.values():
                parameter += torch.randn(parameter.shape)
        settings = TrainConfig(
            model_name_or_path=str(base),
            data_path=["/data/of/mine/videos.json"],
            output_dir=str(tmp_path / "out"),
            version="v1",  # as runs settle it
            seed=5,
            mm_use_vid_start_end=start_end,
            **flags,
        )
        folder = checkpoint.save(
            tmp_path / "out",
            7,
            groups={"model": trained},
            state={
                "config": asdict(settings),
                "tokens": asdict(tokenizer.tokens),
                "step": 7,
                "total_steps": 9,
                "num_samples": 1234,
            },
        )
        return folder, model, tokenizer

    return make


def load_vocabulary(path):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path)).get_piece_size()


def text_batch(ids):
    empty = torch.empty(0, dtype=torch.int64)
    positions, layout = torch.arange(len(ids), dtype=torch.int32), AttentionLayout.of_lengths([len(ids)])
    return PackedBatch(torch.tensor(ids), positions, layout, empty, torch.empty(0, C), empty, empty, empty)


def logits(model, ids):
    return model.logits(model.hidden(text_batch(ids)))


def assert_equal_models(model, other):
    """The same computation: equal tensors, `model`'s boundary rows in `other`'s table."""
    mine = {name: p.detach().clone() for name, p in model.named_parameters()}
    if "boundary.weight" in mine:
        mine["embed.weight"][-2:] = mine.pop("boundary.weight")
    theirs = dict(other.named_parameters())
    assert set(mine) == set(theirs)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
