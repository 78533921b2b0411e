"""What fastvid's training step is compared with: transformers' LLaMA under the reference's recipe, with what its
libraries offer switched on, and tuned by hand.

All take the samples of one optimizer step as `fastvid.data` encodes them, padded on the right to the longest of a
micro-batch, and start from the weights that fastvid loads.

Dimensions: B samples of a micro-batch, T rows of its longest, R video rows, C channels, D hidden size, V vocabulary.
"""

import importlib.util
import inspect
import itertools
import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fastvid.config import policy
from fastvid.weights.model_config import read_model_config
from fastvid.weights.names import tensor_parts
from fastvid.weights.starting import StartingWeights

IGNORED = -100


class Baseline:
    """One optimizer step over padded micro-batches.

    Args:
        folder: model folder.
        samples: (EncodedSample, [features]) pairs of the step.
        tokens: VideoTokens.
        dtype: of matrix products.
        micro_batch: most samples of a forward pass.
        device: where to compute.
        learning_rate: of every step but the first.

    Attributes:
        rows: computed rows, padding included.
        sample_rows: rows without padding.
    """

    sorted_by_length = False

    def __init__(self, folder, samples, tokens, *, dtype, micro_batch, device, learning_rate):
        self.tokens, self.dtype, self.device, self.learning_rate = tokens, dtype, device, learning_rate
        self.folder = folder
        self.model, self.projector = load(folder, tokens, self.weight_dtype, self.device, self.attention())
        self.prepare()
        self.trained = [
            p for module in (self.model, self.projector, *self.extra()) for p in module.parameters() if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0, fused=self.fused_optimizer)
        self.take(samples, micro_batch)

    def take(self, samples, micro_batch):
        """From now on, step over these samples; the next step has learning rate 0."""
        if self.sorted_by_length:
            samples = sorted(samples, key=lambda sample: len(sample[0].token_ids))
        parts = [samples[i : i + micro_batch] for i in range(0, len(samples), micro_batch)]
        self.batches = [padded(part, self.tokens, self.device) for part in parts]
        self.samples, self.rows = len(samples), sum(batch["ids"].numel() for batch in self.batches)
        self.sample_rows = sum(int(batch["mask"].sum()) for batch in self.batches)
        self.supervised = sum(int((batch["labels"] != IGNORED).sum()) for batch in self.batches)
        self.optimizer.param_groups[0]["lr"] = 0.0

    def step(self):
        """(loss per supervised token, gradient norm) of one update; the first has learning rate 0."""
        total = torch.zeros((), device=self.device)
        for batch in self.batches:
            loss = self.loss(batch) / self.supervised
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        return total.item(), norm.item()

    def extra(self):
        return ()

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def embedded(self, batch):
        """Rows [B, T, D] with the video's in their place; none but the two around it train the embedding table."""
        video = self.projector(batch["features"].float())
        rows = []
        x_BTD = self.model.model.embed_tokens(batch["ids"])
        for x_TD, video_RD, (start, end) in zip(x_BTD, video, batch["boundaries"]):
            first, last = self.boundary(x_TD, start, end)
            rows.append(torch.cat([x_TD[:start].detach(), first, video_RD, last, x_TD[end + 1 :].detach()]))
        return torch.stack(rows)

    def boundary(self, x_TD, start, end):
        """The trained rows [1, D] before and behind the video: of the embedding table, here."""
        return x_TD[start : start + 1], x_TD[end : end + 1]


class Reference(Baseline):
    """The reference's recipe (Video-LLaVA 0c8810f): fp32 weights, autocast for bf16, every layer recomputed, logits of
    all rows, the embedding table trained with every row but the start and end tokens' detached.
    """

    weight_dtype = torch.float32
    fused_optimizer = False

    def attention(self):
        return "sdpa"

    def prepare(self):
        self.model.requires_grad_(False)
        self.model.model.embed_tokens.requires_grad_(True)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()

    def loss(self, batch):
        with self.autocast():
            h = self.model.model(
                inputs_embeds=self.embedded(batch), attention_mask=batch["mask"], use_cache=False
            ).last_hidden_state
            logits = self.model.lm_head(h)
            shifted = logits[..., :-1, :].contiguous()
            return functional.cross_entropy(
                shifted.view(-1, shifted.shape[-1]),
                batch["labels"][:, 1:].flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )


class Strong(Baseline):
    """What a user gets who switches on what the libraries offer: weights in the compute dtype, nothing recomputed, the
    model's own loss, fused AdamW; Liger's kernels and flash-attention where they are installed (on CUDA), else SDPA.

    Batches, mask and trained parameters are the reference's; the embedding table is in the compute dtype too.
    """

    fused_optimizer = True
    masked = True

    @property
    def weight_dtype(self):
        return self.dtype

    def attention(self):
        from transformers.utils import is_flash_attn_2_available

        wanted = self.device.type == "cuda" and self.dtype != torch.float32
        return "flash_attention_2" if wanted and is_flash_attn_2_available() else "sdpa"

    def prepare(self):
        self.model.requires_grad_(False)
        self.model.model.embed_tokens.requires_grad_(True)
        if self.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=self.model)
        self.model.train()

    def loss(self, batch):
        with self.autocast():
            x_BTD = self.embedded(batch)
        # Divided by the tokens of the batch alone by default; 1 leaves the sum.
        return self.model(
            inputs_embeds=x_BTD,
            attention_mask=batch["mask"] if self.masked else None,
            labels=batch["labels"],
            use_cache=False,
            num_items_in_batch=1,
        ).loss


class Tuned(Strong):
    """What a user could make of it by hand: samples of like length together, no mask, and the start and end tokens as
    two rows of their own, so that the embedding table has no gradient.

    Rows are padded on the right, where causal attention never looks, so no mask is needed and SDPA stays causal.
    """

    sorted_by_length = True
    masked = False

    def prepare(self):
        super().prepare()
        table = self.model.model.embed_tokens.requires_grad_(False).weight
        self.pair = nn.Embedding.from_pretrained(table[[self.tokens.start, self.tokens.end]].float(), freeze=False)

    def extra(self):
        return (self.pair,)

    def boundary(self, x_TD, start, end):
        return self.pair.weight.to(self.dtype).split(1)


class Lora(Tuned):
    """LoRA by `peft` on weights in the compute dtype, its own too, as tuned by hand: nothing recomputed, no mask."""

    settings = policy.Lora(64, 128.0)

    def prepare(self):
        import peft

        super().prepare()
        lora = self.settings
        config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
        self.model = peft.inject_adapter_in_model(config, self.model)
        targets = {name: p for name, p in self.model.named_parameters() if ".lora_" in name}
        model = read_model_config(self.folder, vocab_size=self.tokens.vocab_size)
        starting = StartingWeights(model, self.folder, tokens=self.tokens, lora=lora)
        with torch.no_grad():
            for ours, parts in starting.low_rank.items():
                for (name, _), piece in zip(parts, starting.pieces(ours), strict=True):
                    targets.pop(name.replace(".weight", ".default.weight")).copy_(piece)
        assert not targets, f"not filled: {sorted(targets)}"


class LoraRecipe(Lora):
    """The same as LLaVA's script has it: batches in the file's order with their mask, every layer recomputed."""

    sorted_by_length = False
    masked = True

    def prepare(self):
        super().prepare()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


class Compiled(Tuned):
    """The same with the decoder compiled for any length."""

    def prepare(self):
        super().prepare()
        self.model.model.compile(dynamic=True)


class Unpadded(Tuned):
    """What packing can make of it: samples end to end in one row without padding, each attending to itself through
    torch's varlen attention (transformers calls what its `AttentionInterface` was given), and nothing between them.
    """

    def attention(self):
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register("fastvid_bench_varlen", varlen_attention)
        AttentionMaskInterface.register("fastvid_bench_varlen", lambda *args, **kwargs: None)
        return "fastvid_bench_varlen"

    def loss(self, batch):
        with self.autocast():
            x_BTD = self.embedded(batch)
        sizes = batch["mask"].sum(1).tolist() if "sizes" not in batch else batch["sizes"]
        batch["sizes"] = sizes
        bounds = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=self.device)
        rows = torch.cat([x_TD[:size] for x_TD, size in zip(x_BTD, sizes)])[None]
        labels = torch.cat([row[:size] for row, size in zip(batch["labels"], sizes)])[None]
        positions = torch.cat([torch.arange(size, device=self.device) for size in sizes])[None]
        return self.model(
            inputs_embeds=rows,
            position_ids=positions,
            labels=labels,
            use_cache=False,
            num_items_in_batch=1,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=max(sizes),
            max_length_k=max(sizes),
        ).loss


def varlen_attention(
    module, q_1HNd, k_1KNd, v_1KNd, attention_mask, scaling=None, dropout=0.0, *, cu_seq_lens_q, max_length_q, **others
):
    """transformers' attention over samples laid end to end: torch's FlashAttention on a GPU, else SDPA by segments."""
    if q_1HNd.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (q_1HNd, k_1KNd, v_1KNd))
        return varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **_causal(varlen_attn))[
            None
        ], None
    outs = [
        functional.scaled_dot_product_attention(q_1HNd[:, :, a:b], k_1KNd[:, :, a:b], v_1KNd[:, :, a:b], is_causal=True)
        for a, b in pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(outs, 2).transpose(1, 2), None


def _causal(function):
    return {"window_size": (-1, 0)} if "window_size" in inspect.signature(function).parameters else {"is_causal": True}


def padded(samples, tokens, device):
    """Ids, mask, labels (not shifted) and features of a micro-batch: [B, T], [B, T], [B, T], [B, R, C]; and each
    sample's rows of <vid_start> and <vid_end>.
    """
    ids, labels = [], []
    for sample, _ in samples:
        ids.append(torch.tensor(sample.token_ids))
        label = torch.full_like(ids[-1], IGNORED)
        for start, end in sample.supervised:
            label[start:end] = ids[-1][start:end]
        labels.append(label)
    batch = {
        "ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, True, IGNORED),
        "mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "features": torch.stack(list(itertools.chain.from_iterable(features for _, features in samples))),
    }
    boundaries = [(sample.token_ids.index(tokens.start), sample.token_ids.index(tokens.end)) for sample, _ in samples]
    return {name: tensor.to(device) for name, tensor in batch.items()} | {"boundaries": boundaries}


def load(folder, tokens, dtype, device, attention):
    """(LlamaForCausalLM in `dtype`, projector in fp32) with the weights that fastvid starts from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = read_model_config(folder, vocab_size=tokens.vocab_size)
    values = {
        key: value
        for key, value in json.loads((Path(folder) / "config.json").read_text()).items()
        if key not in ("model_type", "architectures")
    }
    values["vocab_size"] = config.decoder.vocab_size
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**values), dtype=dtype, attn_implementation=attention)
        channels, hidden = config.mm_hidden_size, config.decoder.hidden_size
        projector = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    starting = StartingWeights(config, folder, tokens=tokens)
    targets = dict(model.named_parameters())
    targets |= {f"model.mm_projector.{name}": parameter for name, parameter in projector.named_parameters()}
    with torch.no_grad():
        for ours, parts in tensor_parts(config).items():
            pieces = starting.pieces(ours)
            pieces = [torch.cat(pieces)] if len(parts) == 1 else pieces
            for (name, _), piece in zip(parts, pieces, strict=True):
                targets.pop(name).copy_(piece)
    assert not targets, f"not filled: {sorted(targets)}"
    return model, projector
