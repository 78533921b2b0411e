"""A row's optimizer step at true sizes, counted (`bench.traffic`) on the meta device: no weights, nothing computed.

Rows, segments and supervised rows are those of the real batches, which are packed as the benchmark packs them. Layers
alike take alike, so that models of two and three layers tell what a step of all layers takes. Nothing is recomputed.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fastvid_kernels.dispatch import meta_stands_for

from bench.traffic import MOVED, Call, Traffic, flash, gathering
from bench.train_data import write
from bench.train_presets import PRESETS, ROWS
from bench.train_rows import config_of, packed
from fastvid import train
from fastvid.checkpoints.saver import Saver
from fastvid.data.dataset import SampleSet
from fastvid.data.loader import training_loader
from fastvid.data.tokenizer import load_tokenizer
from fastvid.dist.parallel import World
from fastvid.features.folder import FeatureFolder
from fastvid.model.lora import draw_dropout
from fastvid.model.quantize import QuantizedLinear
from fastvid.model.video_llava import VideoLlava
from fastvid.training import flops, planning
from fastvid.training.optimizer import Optimizer
from fastvid.training.staging import Staging
from fastvid.training.state import TrainState
from fastvid.weights.model_config import read_model_config

META = torch.device("meta")
GATHERED = ", keys gathered"
FEW = 2  # layers of the smaller of two models


@dataclass(frozen=True)
class CountedStep:
    """What one optimizer step of a row takes.

    Attributes:
        layers: of the model.
        rows, samples, micro_batches: of the step.
        layer: {call: times} of one layer that is not the last, in all micro-batches.
        others: of everything else, the last layer included.
        key_rows: of each micro-batch, keys of all segments, each with its own copy of what it shares.
        leading: first sizes of all tensors of more than one dimension that the step made.
    """

    layers: int
    rows: int
    samples: int
    micro_batches: int
    layer: Counter[Call]
    others: Counter[Call]
    key_rows: frozenset[int] = frozenset()
    leading: frozenset[int] = frozenset()

    def calls(self):
        """{call: times} of the whole step."""
        return self.others + Counter({call: times * (self.layers - 1) for call, times in self.layer.items()})

    @property
    def bytes_per_row(self):
        """Bytes that operations other than products and attention move, by packed row and layer."""
        return sum(call.bytes * times for call, times in self.layer.items() if call.kind == MOVED) / self.rows

    @property
    def launches_per_layer(self):
        """Kernels of a layer and micro-batch, forward and backward."""
        return sum(call.launches * times for call, times in self.layer.items()) / self.micro_batches

    def table(self):
        """Bytes by row and launches by micro-batch of each operation in a layer, as text; the most bytes first."""
        moved, launches = Counter(), Counter()
        for call, times in self.layer.items():
            moved[call.name] += call.bytes * times if call.kind == MOVED else 0
            launches[call.name] += call.launches * times
        lines = [f"{'bytes a row':>12} {'launches':>9}  of a layer"]
        for name in sorted(launches, key=lambda name: -moved[name]):
            bytes_each, times = moved[name] / self.rows, launches[name] / self.micro_batches
            lines.append(f"{bytes_each:12,.0f} {times:9.1f}  {name}")
        lines.append(f"{self.bytes_per_row:12,.0f} {self.launches_per_layer:9.1f}  together")
        return "\n".join(lines)


class Counted:
    """The rows of a preset, counted one by one.

    Args:
        preset: of `bench.train_presets`.
        folder: receives samples and features; made if missing.
    """

    def __init__(self, preset, folder):
        self.preset, self.folder = made, _ = PRESETS[preset], Path(folder)
        write(self.folder, made.shape, made.videos, budget_videos=made.budget_videos, weights=False)

    def step(self, name, *, gathered=False):
        """`CountedStep` of a row of fastvid's.

        Args:
            gathered: attention copies each segment's keys, as it did before it took shared videos in two parts.
        """
        row, layers = ROWS[name], self.preset.shape.layers
        config = config_of(row, self.folder, torch.bfloat16, self.preset.micro_batch)
        tokenizer = load_tokenizer(config.model_name_or_path, True)
        samples = SampleSet(config.data_path, tokenizer, FeatureFolder(config.video_folder), config)
        samples.fit(self.preset.shape.channels)
        loader = training_loader(config, samples, World(0, 1, 0, torch.device("cpu"), False))
        batches = packed(row, loader, row.micro_batch or self.preset.micro_batch)
        attention = gathering if gathered else flash
        few, more = (self._counted(config, tokenizer, loader, batches, number, attention) for number in (FEW, FEW + 1))
        leading = frozenset(few.leading | more.leading)
        few, more = few.calls, more.calls
        layer = more - few
        return CountedStep(
            layers=layers,
            rows=sum(batch.num_rows for batch in batches),
            samples=sum(len(batch.sample_ids) for batch in batches),
            micro_batches=len(batches),
            layer=layer,
            others=few - Counter({call: times * (FEW - 1) for call, times in layer.items()}),
            key_rows=frozenset(sum(batch.layout.lengths[1]) for batch in batches),
            leading=leading,
        )

    def _counted(self, config, tokenizer, loader, batches, layers, attention):
        """`Traffic` of the step of a model of so many layers."""
        sizes = read_model_config(config.model_name_or_path, vocab_size=tokenizer.tokens.vocab_size)
        sizes = replace(sizes, decoder=replace(sizes.decoder, num_layers=layers))
        precision = planning.precision_of(config)
        with meta_stands_for("cuda"):
            with META:
                model = VideoLlava(
                    sizes, trainable=config.trainable, precision=precision, recompute="none", attention=attention
                )
            for module in model.modules():
                if isinstance(module, QuantizedLinear):
                    module.quantize_(torch.empty(module.outputs, module.inputs, dtype=precision.compute, device=META))
            if loader.prefix:
                model.keep_prefix(loader.prefix)
            draw_dropout(model, (0,))
            trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            state = TrainState(
                config=config,
                world=World(0, 1, 0, META, False),
                tokenizer=tokenizer,
                model=model,
                optimizer=Optimizer(trained, config, META),
                loader=loader,
                evaluation=None,
                formula=flops.Formula(sizes, config.trainable),
                loss_sum=torch.zeros((), dtype=torch.float64, device=META),
                saver=Saver(),
                staging=Staging(META),
                plan=planning.Plan(precision, 1, 1, "replicated", "none", False, 0, False),
            )
        with Traffic() as traffic:
            train.train_step(state, batches)
        return traffic


def counted(preset, names):
    """{name: CountedStep} of rows of fastvid's; a name that ends in `GATHERED` is a row's with keys gathered."""
    with tempfile.TemporaryDirectory() as folder:
        made = Counted(preset, folder)
        return {name: made.step(name.removesuffix(GATHERED), gathered=name.endswith(GATHERED)) for name in names}
