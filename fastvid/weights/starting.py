"""The weights that training starts from.

V: vocabulary rows, D: hidden size.
"""

import math
import zlib
from typing import NoReturn

import torch
from torch import Tensor

from fastvid.batch import VideoTokens
from fastvid.config.policy import Lora
from fastvid.files import StrPath
from fastvid.model.config import ModelConfig
from fastvid.model.lora import delta
from fastvid.weights.adapter import merged_adapters, read_adapter
from fastvid.weights.model_folder import ModelFolder
from fastvid.weights.names import lora_parts, projector_type, tensor_parts
from fastvid.weights.projector_file import read_projector

_QUANTISED = (".qweight", ".qzeros", ".scales", ".absmax", ".quant_map", ".weight_scale")  # AWQ and its like
_TABLES = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}


class StartingWeights:
    """A model folder, a projector file and the rows of new tokens: what each of our tensors holds before training.

    New rows are the reference's (Video-LLaVA 0c8810f, initialize_vision_tokenizer): normal with the config's
    initializer_range, but for <vid_start> and <vid_end>, which are the fp32 mean over the rows before them, new ones
    included. Here they depend on `seed` and nothing else.
    """

    def __init__(
        self,
        config: ModelConfig,
        folder: StrPath,
        *,
        tokens: VideoTokens,
        projector: StrPath | None = None,
        seed: int = 42,
        lora: Lora | None = None,
        adapter: StrPath | None = None,
    ):
        """
        Args:
            config: that `read_model_config` made of `folder`.
            folder: the model folder.
            projector: file or checkpoint folder whose projector (and start and end rows) go before the folder's.
            seed: of new rows, and of a projector and low-rank matrices that no file holds.
            lora: the model has low-rank matrices beside its own.
            adapter: folder that holds those (`read_adapter`). Without `lora` they are merged into the model's own
                matrices.

        Raises:
            ValueError: names a file that cannot be read; an adapter that is none of `lora`'s settings, or that the
                folder's matrices hold already.
        """
        assert tokens.vocab_size <= config.decoder.vocab_size, "read_model_config was not told the tokenizer's size"
        self.config, self.tokens, self.seed = config, tokens, seed
        self.parts = tensor_parts(config)
        self.folder = ModelFolder(folder)
        self.projector_path = projector
        self.projector = {} if projector is None else read_projector(projector, tokens)
        self.makes_projector = (
            "projector.0.weight" not in self.projector and projector_type(self.folder) != config.projector_type
        )
        self.makes_second = (
            config.mm_hidden_size_2 is not None
            and "projector.second.0.weight" not in self.projector
            and projector_type(self.folder, second=True) != config.projector_type
        )
        self.low_rank = {} if lora is None else lora_parts(config.decoder, lora)
        self.adapter = None if adapter is None else read_adapter(adapter, config.decoder)
        held = merged_adapters(self.folder.folder)
        if self.adapter is not None and held and self.adapter.digest() in held:
            raise ValueError(
                f"{self.adapter.path} is merged into {self.folder.folder} already: leave --adapter and --projector out "
                "(chat, evaluate, serve), or --lora_weights (train)"
            )
        if self.adapter is not None and lora is not None:
            _check_settings(self.adapter, lora)
        self._merges = self.adapter is not None and lora is None
        self._rows: dict[str, dict[int, Tensor]] = {}

    @staticmethod
    def exist(folder: StrPath) -> bool:
        """Whether a model's folder holds weights in any form."""
        return ModelFolder.file_of(folder) is not None

    def check(self) -> None:
        """Compare names, shapes and dtypes of the files' tensors with the model's, before anything is copied.

        Raises:
            ValueError: names what is missing, mis-shaped or unexpected, its file, and the remedy.
        """
        problems, expected = [], {"lm_head.weight"}  # a tied model may store its head as well
        if self.makes_projector or self.makes_second or self.projector:
            expected |= {
                name for name in self.folder if name.startswith(("model.mm_projector.", "model.mm_projector_2."))
            }
        for ours, parts in self.parts.items():
            for name, shape in parts:
                expected.add(name)
                if ours in self.projector:
                    problems += _misfit(self.projector_path, ours, self.projector[ours], shape)
                elif self._is_new(ours):
                    continue
                elif name not in self.folder:
                    problems.append(f"{name} is missing")
                else:
                    grows = ours in _TABLES
                    problems += _misfit(self.folder.paths[name], name, self.folder[name], shape, grows)
        if "boundary.weight" in self.projector:
            rows, shape = self.projector["boundary.weight"], (2, self.config.decoder.hidden_size)
            problems += _misfit(self.projector_path, "the start and end embeddings", rows, shape)
        problems += [f"{self.folder.paths[name]}: {name} is unexpected" for name in self.folder if name not in expected]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            remedy = "Complete the download, or take the projector file that belongs to this model."
            if any("quantised" in problem for problem in problems) or any(
                name.endswith(_QUANTISED) for name in self.folder
            ):
                remedy = "These are quantised weights: take the folder of the model that they were made of."
            raise ValueError(
                f"{self.folder.folder} does not fit its config.json: {'; '.join(problems[:8])}{more}. {remedy}"
            )

    def refuse_not_finite(self, name: str) -> NoReturn:
        """Raise ValueError for our tensor `name`, which holds NaN or infinity; names the file and its tensor."""
        sources = (
            [(self.projector_path, name, self.projector[name])]
            if name in self.projector
            else [
                (self.folder.paths[part], part, self.folder[part])
                for part, _ in self.parts.get(name, ())
                if part in self.folder
            ]
        )
        if name in ("embed.weight", "boundary.weight") and "boundary.weight" in self.projector:
            sources.append((self.projector_path, "the start and end embeddings", self.projector["boundary.weight"]))
        for path, part, tensor in sources:
            if count := int((~torch.isfinite(tensor)).sum()):
                raise ValueError(
                    f"{path}: {count:,} of {tensor.numel():,} values of {part} are not finite (NaN or "
                    "infinity), and nothing can be computed from them; download it again, or take weights "
                    "of an earlier step"
                )
        raise ValueError(f"{self.folder.folder}: {name} is not finite (NaN or infinity) in the precision of this run")

    def pieces(self, name: str) -> list[Tensor]:
        """The CPU tensors that lie one under the other in our tensor `name`, in the precision they are stored in.

        Of a tensor that `tensor_parts` lists, other than a table, there is one for each part.
        """
        if name == "boundary.weight":
            return [self._row("embed.weight", i)[None] for i in (self.tokens.start, self.tokens.end)]
        if name in _TABLES:
            return self._table_pieces(name)
        if name in self.projector:
            return [self.projector[name]]
        if self._is_new(name):
            return [self._new_projector_tensor(name)]
        if name in self.low_rank:
            return [self._low_rank_tensor(part, shape) for part, shape in self.low_rank[name]]
        return [self._merged(part) if self._merges else self.folder[part] for part, _ in self.parts[name]]

    def _is_new(self, name):
        """Whether our tensor `name` is of a projector that no file holds."""
        second = name.startswith("projector.second.")
        return self.makes_second if second else name.startswith("projector.") and self.makes_projector

    def _low_rank_tensor(self, part, shape):
        """The adapter's, or a new one as PEFT draws it: A as nn.Linear's weight, B zeros."""
        if self.adapter is not None:
            return self.adapter.tensors[part]
        if part.endswith(".lora_B.weight"):
            return torch.zeros(shape)
        return _uniform(shape, shape[1], _generator(self.seed, part))

    def _merged(self, part):
        """The folder's tensor; where the adapter has a product to add to it, their sum in fp32."""
        assert self.adapter is not None
        held, place = self.folder[part], part.removesuffix(".weight")
        if f"{place}.lora_A.weight" not in self.adapter.tensors:
            return held
        a_rI, b_Or = (self.adapter.tensors[f"{place}.lora_{which}.weight"] for which in "AB")
        return held.float() + delta(a_rI, b_Or, self.adapter.lora)

    def _table_pieces(self, name):
        table, rows = self.folder[_TABLES[name]], self._replaced_rows(name)
        pieces, at = [], 0
        for i in sorted(rows):
            pieces += [table[at:i], rows[i][None]]
            at = i + 1
        return [piece for piece in [*pieces, table[at:]] if len(piece)]

    def _row(self, name, i):
        rows = self._replaced_rows(name)
        return rows[i] if i in rows else self.folder[_TABLES[name]][i]

    def _replaced_rows(self, name) -> dict[int, Tensor]:
        """{row: fp32 [D]} of the rows of a table that do not come from the folder."""
        if name not in self._rows:
            self._rows[name] = self._make_rows(name)
        return self._rows[name]

    def _make_rows(self, name):
        table = self.folder[_TABLES[name]]
        new = sorted({*self.tokens.added, *range(len(table), self.config.decoder.vocab_size)})
        mean = [i for i in new if i in (self.tokens.start, self.tokens.end)]
        generator = _generator(self.seed, name)
        rows = {
            i: torch.randn(table.shape[1], generator=generator) * self.config.initializer_range
            for i in new
            if i not in mean
        }
        if mean:
            before = torch.empty(mean[0], table.shape[1])
            before[: len(table)] = table[: mean[0]]
            for i in (i for i in rows if i < mean[0]):
                before[i] = rows[i]
            rows |= dict.fromkeys(mean, before.mean(0))
        if name == "embed.weight" and "boundary.weight" in self.projector:
            assert self.tokens.start is not None and self.tokens.end is not None
            rows |= zip((self.tokens.start, self.tokens.end), self.projector["boundary.weight"].float())
        return rows

    def _new_projector_tensor(self, name):
        """What nn.Linear's reset_parameters draws: uniform within ±1/sqrt(inputs), weight and bias alike."""
        weight = name.replace(".bias", ".weight")
        return _uniform(self.parts[name][0][1], self.parts[weight][0][1][1], _generator(self.seed, name))


def _uniform(shape, inputs, generator):
    bound = 1 / math.sqrt(inputs)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _check_settings(adapter, lora):
    """Refuse to start from an adapter of other settings than the run's."""
    flags = {
        "--lora_r": (adapter.lora.rank, lora.rank),
        "--lora_alpha": (f"{adapter.lora.alpha:g}", f"{lora.alpha:g}"),
        "--lora_targets": (" ".join(adapter.lora.targets), " ".join(lora.targets)),
        "--use_rslora": (adapter.lora.rslora, lora.rslora),
    }
    differing = {flag: theirs for flag, (theirs, ours) in flags.items() if theirs != ours}
    if differing:
        raise ValueError(
            f"--lora_weights: {adapter.path} has other settings than this run: give "
            f"{' '.join(f'{flag} {value}' for flag, value in differing.items())}"
        )


def _generator(seed, name):
    """A random stream of its own for each tensor: the same on every rank, in whatever order tensors are made."""
    return torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))


def _misfit(path, name, tensor, shape, grows=False):
    """[what is wrong with a file's tensor]. A table that `grows` may have fewer rows than the model's."""
    found = tuple(tensor.shape)
    fits = found == shape or (grows and len(found) == 2 and found[1:] == shape[1:] and 0 < found[0] < shape[0])
    if not fits:
        return [f"{path}: {name} is {list(found)}, the model's is {list(shape)}"]
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return [f"{path}: {name} is {tensor.dtype}: quantised weights are not computed"]
    return []
