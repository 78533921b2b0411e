"""What a training step is measured on: a model folder of random weights, a tokenizer, records and features, all by
seed.

Lengths. VideoInstruct-100K asks about 13.3 thousand videos 100 thousand times: 7.5 questions a video, here 8 and 7 in
turn. Of a sample's 830 rows on average 676 are the video's and 75 supervised (answer and `</s>`); those two means were
measured under the reference's template. Within them questions and answers spread log-normally (`SPREAD`), which is an
assumption: descriptions are several times as long as the answers to what, who and where. The quantiles of the
distribution are taken at equal steps and shuffled, so that few samples have the spread of many.
"""

import itertools
import json
import random
from pathlib import Path
from statistics import NormalDist

import torch

from bench.train_presets import QUESTIONS

MEAN_ROWS, MEAN_SUPERVISED = 830, 75
SPREAD = {"answer": 0.7, "question": 0.45}  # standard deviation of the length's logarithm
SHORTEST = {"answer": 4, "question": 6}
PIECES = 524  # so that the system text takes about as many as in LLaMA (34 with BOS and "USER:")
WORDS = (
    "the man in a red shirt walks along wide street and then turns to wave at his friend who waits beside old car "
    "while dog runs over grass near water people dance on stage with music playing behind them what is happening "
    "video describe how why does she hold ball before game ends"
).split()
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: {q} ASSISTANT: {a}"
)
# Tokens of a sample beside question, answer, </s> and the video's rows: BOS and system text (with this file's tokenizer
# about as many as with LLaMA's), the roles, <vid_start> and <vid_end>.
SURROUNDING = 38


def write(folder, shape, videos, seed=0, budget_videos=0, weights=True):
    """Write model/, feats/ and train.json into `folder`: all samples about `videos` videos, which make one step.

    And budget.json, about `budget_videos` videos, which fill batches of any budget.

    Weights are stored in bf16, so that every row starts from the same numbers in whatever precision it computes.
    Without `weights` there are none, for who counts what a step does.
    """
    folder = Path(folder)
    rng = random.Random(seed)
    (folder / "feats").mkdir(parents=True)
    (folder / "model").mkdir()
    if weights:
        write_model(folder / "model", shape, seed)
    else:
        write_config(folder / "model", shape)
    write_tokenizer(folder / "model", rng)
    write_features(folder / "feats", shape, max(videos, budget_videos), seed)
    (folder / "train.json").write_text(json.dumps(records(videos, rng)))
    if budget_videos:
        (folder / "budget.json").write_text(json.dumps(records(budget_videos, rng)))


def records(videos, rng):
    """Training records; question first and video first in turn, as the reference's conversion has it."""
    names = [f"video{i}" for i, count in zip(range(videos), itertools.cycle(QUESTIONS)) for _ in range(count)]
    answers = lengths(len(names), MEAN_SUPERVISED - 1, "answer", rng)
    questions = lengths(len(names), MEAN_ROWS - 676 - MEAN_SUPERVISED - SURROUNDING, "question", rng)
    found = []
    for i, (name, question, answer) in enumerate(zip(names, questions, answers)):
        asked, said = (" ".join(rng.choices(WORDS, k=count)) for count in (question, answer))
        found.append(
            {
                "id": f"{name}_{i}",
                "video": f"{name}.safetensors",
                "conversations": [
                    {"from": "human", "value": f"<video>\n{asked}" if i % 2 else f"{asked}\n<video>"},
                    {"from": "gpt", "value": said},
                ],
            }
        )
    return found


def lengths(count, mean, kind, rng):
    """`count` lengths in tokens with the given mean, log-normal."""
    sigma = SPREAD[kind]
    middles = [NormalDist(0, sigma).inv_cdf((i + 0.5) / count) for i in range(count)]
    values = [torch.tensor(middle).exp().item() for middle in middles]
    scale = mean * count / sum(values)
    rng.shuffle(values)
    return [max(SHORTEST[kind], round(value * scale)) for value in values]


def write_model(folder, shape, seed):
    """A LLaVA-1.5 folder: config.json and one safetensors file per layer, normal with deviation 0.02, norms one."""
    from safetensors.torch import save_file

    hidden, wide = shape.hidden, shape.intermediate
    generator = torch.Generator(_fastest()).manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.bfloat16).mul_(0.02).cpu()

    def layer(i):
        name, one = f"model.layers.{i}.", torch.ones(hidden, dtype=torch.bfloat16)
        return {
            name + "input_layernorm.weight": one,
            name + "post_attention_layernorm.weight": one.clone(),
            **{f"{name}self_attn.{part}_proj.weight": normal(hidden, hidden) for part in "qkvo"},
            **{f"{name}mlp.{part}_proj.weight": normal(wide, hidden) for part in ("gate", "up")},
            name + "mlp.down_proj.weight": normal(hidden, wide),
        }

    def rest():
        return {
            "model.embed_tokens.weight": normal(shape.vocabulary, hidden),
            "lm_head.weight": normal(shape.vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            "model.mm_projector.0.weight": normal(hidden, shape.channels),
            "model.mm_projector.0.bias": normal(hidden),
            "model.mm_projector.2.weight": normal(hidden, hidden),
            "model.mm_projector.2.bias": normal(hidden),
        }

    places, files = {}, shape.layers + 1
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        tensors = layer(i) if i < shape.layers else rest()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_config(folder, shape)


def write_config(folder, shape):
    """The model folder's config.json."""
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llava",
                "architectures": ["LlavaLlamaForCausalLM"],
                "hidden_act": "silu",
                "vocab_size": shape.vocabulary,
                "hidden_size": shape.hidden,
                "intermediate_size": shape.intermediate,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.heads,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "tie_word_embeddings": False,
                "mm_hidden_size": shape.channels,
                "mm_projector_type": "mlp2x_gelu",
            },
            indent=1,
        )
    )


def _fastest():
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_tokenizer(folder, rng):
    """A small byte-pair tokenizer, with a piece for each of WORDS; ids beyond its own stay unused rows of the
    tables."""
    import sentencepiece

    texts = [
        TEMPLATE.format(q=" ".join(rng.choices(WORDS, k=20)), a=" ".join(rng.choices(WORDS, k=60))) for _ in range(200)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )


def write_features(folder, shape, videos, seed):
    from fastvid.features.file import save_features

    generator = torch.Generator().manual_seed(seed)
    for i in range(videos):
        features = torch.randn(shape.video_rows, shape.channels, generator=generator)
        save_features(folder / f"video{i}.safetensors", features.half(), {})
