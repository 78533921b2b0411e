"""The tiny model's forward, gradients and training runs, by upstream's train()."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from recordings import upstream

FLAGS = """--version v1 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1
--evaluation_strategy no --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
--logging_steps 1 --model_max_length 2048 --lazy_preprocess True --disable_tqdm True --save_strategy no""".split()
ADAPTER = ["--tune_mm_mlp_adapter", "True", "--mm_use_vid_start_end"]
SCHEDULES = [(5, 0.03), (20, 0.1), (100, 0.03), (997, 0.03), (3, 0.5), (1, 0.03), (40, 0.0)]


def argv(variant, name, *more):
    """Upstream's flags; WORK stands for the folder with the tiny models."""
    folders = ["--model_name_or_path", f"WORK/model{variant}", "--data_path", f"WORK/data{variant}/train.json"]
    folders += ["--video_folder", f"WORK/data{variant}/feats", "--output_dir", f"WORK/out_{name}"]
    return [*folders, *FLAGS, *more]


class _Stop(Exception):
    pass


def built(work, words, width):
    """What train() hands its trainer: {"model", "tokenizer", "args", "train_dataset", "data_collator", …}."""
    from video_chatgpt.train import train

    taken = {}

    def stop(**given):
        taken.update(given)
        raise _Stop

    command = ["train.py", *(word.replace("WORK", str(work)) for word in words)]
    with (
        upstream.tiny_models(width),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(train, "VideoChatGPTTrainer", stop),
    ):
        try:
            train.train()
        except _Stop:
            return taken
    raise AssertionError("train() made no trainer")


def first_rows(base, variant, recipe):
    """{"embed": [3, D], "lm_head": [3, D]}: the rows that upstream gives the three video tokens."""
    import torch

    torch.manual_seed(int(variant))
    model = built(base, argv(variant, "rows", *ADAPTER), recipe.MM_HIDDEN)["model"]
    tables = {"embed": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    return {kind: table.weight.detach()[recipe.BASE_VOCAB :].numpy().copy() for kind, table in tables.items()}


def batch_of(given, indices):
    return given["data_collator"]([given["train_dataset"][i] for i in indices])


def forward(given, batch, recipe):
    """Loss, log-sum-exp, gradients, and the values on the way. Shapes: [batch, rows, …]."""
    import torch

    model, seen, vocab = given["model"].train(), {}, recipe.BASE_VOCAB
    model.zero_grad()
    hooks = [
        model.model.layers[0].register_forward_pre_hook(lambda _, taken: seen.update(embedded=taken[0])),
        model.lm_head.register_forward_pre_hook(lambda _, taken: seen.update(hidden=taken[0])),
    ]
    with upstream.tiny_models(recipe.MM_HIDDEN):
        out = model(**batch)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    logits, labels = out.logits.detach(), batch["labels"]
    supervised = labels[:, 1:] != -100
    chosen = logits[:, :-1].log_softmax(-1)[supervised].gather(1, labels[:, 1:][supervised][:, None])[:, 0]
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None or "lm_head" in name or "layers" in name or name == "model.norm.weight":
            continue
        if "embed_tokens" in name:
            rows = parameter.grad.abs().sum(1).nonzero()[:, 0].tolist()
            seen["touched"] = rows
            if rows != [vocab + 1, vocab + 2]:
                continue
            name, gradient = f"embed_rows_{vocab + 1}_{vocab + 2}", parameter.grad[vocab + 1 :]
        else:
            gradient = parameter.grad
        gradients[name] = gradient.clone()
    values = {
        "loss": out.loss.item(),
        "n_supervised": int(supervised.sum()),
        "lengths": batch["attention_mask"].sum(1).tolist(),
    }
    tensors = {"lse": torch.logsumexp(logits, -1), "label_logprob": chosen}
    return values, tensors, gradients, logits, seen


def model(work, base, recipe):
    """(model.json's "variants", tensors of model.safetensors). Models below `base` lack the video tokens."""
    import torch

    vocab, width = recipe.BASE_VOCAB, recipe.MM_HIDDEN
    variants, saved = {}, {}
    picked = sorted({*range(0, vocab, max(1, vocab // 98)), vocab, vocab + 1, vocab + 2})
    for variant in recipe.SIZES:
        given = built(work, argv(variant, "forward", *ADAPTER), width)
        for name, parameter in given["model"].named_parameters():
            if "mm_projector" in name:
                saved[f"{variant}/init/{name}"] = parameter.detach().clone()
        batch = batch_of(given, (0, 1))
        values, tensors, gradients, logits, seen = forward(given, batch, recipe)
        ids = batch["input_ids"]
        positions = [_positions(row, length, vocab) for row, length in zip(ids, values["lengths"])]
        rows = torch.arange(2)[:, None], torch.tensor(positions)
        tensors |= {
            "input_ids": ids.int(),
            "labels": batch["labels"].int(),
            "inputs_embeds_sel": seen["embedded"].detach()[rows],
            "hidden_sel": seen["hidden"].detach()[rows],
            "logits_sel": logits[rows][..., picked],
        }
        saved |= {f"{variant}/video/{name}": x for name, x in tensors.items()}
        saved |= {f"{variant}/video/grad/{name}": x for name, x in gradients.items()}
        variants[variant] = {"vocab_sel": picked, "video": {**values, "positions": positions}}
        if variant == "336":
            variants[variant] |= _variations(given, batch, base, recipe, saved)
    return variants, saved


def _positions(ids, length, vocab):
    """Rows about whose values much can go wrong: the first, those around the video, the last."""
    patches = (ids == vocab).nonzero()[:, 0].tolist()
    first, last = patches[0], patches[-1]
    near = [0, 5, first - 2, first - 1, first, first + 60, first + 99, first + 100, last, last + 1, last + 2]
    return [*(min(i, len(ids) - 1) for i in near), length - 2, length - 1]


def _variations(given, batch, base, recipe, saved):
    """Start and end rows that differ; a model without start and end tokens."""
    import torch

    vocab = recipe.BASE_VOCAB
    pair = f"embed_rows_{vocab + 1}_{vocab + 2}"
    drawn = recipe.random("distinct rows").standard_normal((2, recipe.HIDDEN), dtype=np.float32)
    rows = torch.from_numpy(drawn) * 0.05
    with torch.no_grad():
        given["model"].get_input_embeddings().weight[vocab + 1 :] = rows
    values, tensors, gradients, _, _ = forward(given, batch, recipe)
    saved |= {f"336/distinct/{pair}": rows, "336/distinct/lse": tensors["lse"]}
    saved |= {f"336/distinct/grad/{name}": x for name, x in gradients.items()}
    found = {"distinct": {"loss": values["loss"]}}

    torch.manual_seed(7)
    given = built(base, argv("336", "nose", "--tune_mm_mlp_adapter", "True"), recipe.MM_HIDDEN)
    model, batch = given["model"], batch_of(given, (0, 1))
    saved[f"336/nose/embed_row_{vocab}"] = model.get_input_embeddings().weight.detach()[vocab:].clone()
    saved[f"336/nose/lm_head_row_{vocab}"] = model.get_output_embeddings().weight.detach()[vocab:].clone()
    values, tensors, gradients, _, seen = forward(given, batch, recipe)
    saved |= {
        "336/nose/input_ids": batch["input_ids"].int(),
        "336/nose/labels": batch["labels"].int(),
        "336/nose/lse": tensors["lse"],
        **{f"336/nose/grad/{name}": x for name, x in gradients.items()},
    }
    found["nose"] = {"loss": values["loss"], "embed_rows_with_nonzero_grad": seen["touched"]}
    return found


def trainable(base, recipe):
    """{flags: the parameters that may change}, of all combinations of upstream's flags."""
    table = {}
    for use in (True, False):
        for bits in range(8):
            flags = {
                name: not bits >> i & 1
                for i, name in enumerate(("freeze_mm_mlp_adapter", "freeze_backbone", "tune_mm_mlp_adapter"))
            }
            flags = dict(reversed(flags.items()))
            words = [word for name, on in flags.items() for word in (f"--{name}", str(on))]
            words += ["--mm_use_vid_start_end"] if use else []
            model = built(base, argv("336", "trainable", *words), recipe.MM_HIDDEN)["model"]
            names = [name for name, p in model.named_parameters() if p.requires_grad]
            count, whole = len(names), len(list(model.parameters()))
            short = sorted({re.sub(r"^model\.layers\.\d+", "layers.*", name) for name in names})
            key = " ".join([f"336 se={use}", *(f"{name}={on}" for name, on in flags.items())])
            table[key] = {
                "n": count,
                "names": f"{count} of {whole}: all" if count == whole else short,
                "orig_embeds_params": hasattr(model.get_model(), "orig_embeds_params"),
            }
    return table


def run(work, words, recipe):
    """One run of upstream's train(): what each step did, and what it saved."""
    import torch
    from video_chatgpt.train import train

    words = [word.replace("WORK", str(work)) for word in words]
    output = Path(words[words.index("--output_dir") + 1])
    steps = {"losses": [], "lr": [], "total_norm": [], "order": [], "logged": []}
    after, changing, pending, vocab = [], {}, [], recipe.BASE_VOCAB

    fetch, train_on = train.LazySupervisedDataset.__getitem__, train.VideoChatGPTTrainer.training_step

    def fetched(self, i):
        steps["order"].append(i)
        return fetch(self, i)

    def trained(self, model, inputs):
        loss = train_on(self, model, inputs)
        pending.append(loss.item())
        changing.update({name: p for name, p in model.named_parameters() if p.requires_grad})
        return loss

    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def clipped(*arguments, **options):
        norm = clip(*arguments, **options)
        steps["total_norm"].append(norm.item())
        return norm

    def stepped(self, *arguments, **options):
        steps["lr"].append(self.param_groups[0]["lr"])
        done = step(self, *arguments, **options)
        steps["losses"].append(sum(pending))
        pending.clear()
        after.append({name: p.detach().clone() for name, p in changing.items()})
        return done

    with (
        upstream.tiny_models(recipe.MM_HIDDEN),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(sys, "argv", ["train.py", *words]),
        mock.patch.object(train.LazySupervisedDataset, "__getitem__", fetched),
        mock.patch.object(train.VideoChatGPTTrainer, "training_step", trained),
        mock.patch.object(torch.nn.utils, "clip_grad_norm_", clipped),
        mock.patch.object(torch.optim.AdamW, "step", stepped),
    ):
        train.train()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps["logged"] = [line["loss"] for line in history if "loss" in line]
    tensors = {}
    bins = {}
    for path in sorted(output.rglob("*.bin")):
        state = torch.load(path, weights_only=True)
        bins[str(path.relative_to(output))] = [[name, list(x.shape), str(x.dtype)] for name, x in state.items()]
    for number, parameters in enumerate(after, 1):
        for name, parameter in parameters.items():
            if "embed_tokens" in name:
                name, parameter = f"embed_rows_{vocab + 1}_{vocab + 2}", parameter[vocab + 1 :]
            tensors[f"after_step{number}/{name}"] = parameter
    return steps, tensors, bins


def order(work):
    """Sample order of one process and of several, and learning rates, by the Trainer that upstream's is."""
    import hashlib

    import torch
    from transformers import TrainingArguments
    from video_chatgpt.train.llava_trainer import VideoChatGPTTrainer

    def trainer(samples, rank=0, size=1, **options):
        args = TrainingArguments(str(work), per_device_train_batch_size=2, no_cuda=True, report_to=[], **options)
        made = VideoChatGPTTrainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=list(range(samples)))
        made.args = mock.Mock(wraps=args, world_size=size, process_index=rank, data_seed=None, seed=args.seed)
        made.args.group_by_length = False
        return made

    def epochs(samples, rank, size, count):
        sampler = trainer(samples, rank, size)._get_train_sampler()
        found = []
        for epoch in range(count):
            if size > 1:
                sampler.set_epoch(epoch)
            found.append(list(sampler))
        return found

    def digest(indices):
        return hashlib.sha256(np.asarray(indices, "<i8").tobytes()).hexdigest()

    single = epochs(10, 0, 1, 3)
    two = [epochs(10, rank, 2, 2) for rank in range(2)]
    big = {}
    for samples in (1000, 100_010):
        big[f"single_n{samples}"] = [
            {"head": found[:12], "sha256_i64le": digest(found)} for found in epochs(samples, 0, 1, 3)
        ]
        for size in (2, 4, 8):
            big[f"dist_n{samples}_w{size}"] = [
                {"rank0_head": found[:12], "len": len(found), "sha256_rank0": digest(found)}
                for found in epochs(samples, 0, size, 3)
            ]
    rates = {}
    for total, ratio in SCHEDULES:
        made = trainer(4, learning_rate=2e-5, warmup_ratio=ratio, lr_scheduler_type="cosine")
        args = TrainingArguments(
            str(work), learning_rate=2e-5, warmup_ratio=ratio, lr_scheduler_type="cosine", no_cuda=True, report_to=[]
        )
        made.args = args
        made.create_optimizer_and_scheduler(total)
        used = {}
        for step in range(total):
            used[str(step)] = made.optimizer.param_groups[0]["lr"]
            made.optimizer.step()
            made.lr_scheduler.step()
        kept = {step: lr for step, lr in used.items() if int(step) < 10 or int(step) % 37 == 0 or int(step) > total - 4}
        warmup = args.get_warmup_steps(total)
        rates[f"total={total},ratio={ratio}"] = {"warmup_steps": warmup, "lr_used_at_update": kept}
    return {
        "meta": {"function": "VideoChatGPTTrainer._get_train_sampler, create_optimizer_and_scheduler; seed 42"},
        "single_n10_epochs3": single,
        "dist_n10_w2": [[rank[epoch] for rank in two] for epoch in range(2)],
        "dist_n10_w4_e0": [epochs(10, rank, 4, 1)[0] for rank in range(4)],
        "big": big,
        "lr_schedule": rates,
    }
