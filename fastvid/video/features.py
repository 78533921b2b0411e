"""From a video to its feature file, in one object that can be sent to other processes."""

import copyreg
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastvid
from fastvid.config import ExtractConfig
from fastvid.config.pooling import OF_AN_IMAGE, RECIPE, Pooling
from fastvid.features.file import feature_bytes
from fastvid.files import NOTHING_MORE_FITS, StrPath, atomic_file, wrong_content
from fastvid.video.decode import DecodeError
from fastvid.video.decode.kinds import KINDS
from fastvid.video.decode.still import is_still
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.listing import Video, no_video
from fastvid.video.passes import Features
from fastvid.video.pipeline import Pipeline, Prepared
from fastvid.video.sampling import frame_indices
from fastvid.video.towers.choice import revisions
from fastvid.video.towers.fidelity import Fidelity
from fastvid.video.towers.load import tower_sizes

_DAMAGED = ("is damaged", "does not decode to its end")  # how the reasons begin that --allow_damaged tolerates
TOWERS = {"1.1": "openai/clip-vit-large-patch14", "1.5": "openai/clip-vit-large-patch14-336"}

# An exception is pickled by its message, of which this one cannot be made again.
copyreg.pickle(DecodeError, lambda error: (DecodeError, (error.path, error.reason)))


def refuse_departures(config: ExtractConfig) -> None:
    """Raise ValueError if a job is to compute as the reference does and has flags that it does not know."""
    if config.policy.ffmpeg_colours and KINDS[config.decoder].conversion != "swscale":
        raise ValueError(
            f"--decoder {config.decoder} has colours of its own, which --parity reference does not take; "
            "give auto, pyav or nvdec"
        )
    if config.policy.plain_tower and config.dtype == "bfloat16":
        raise ValueError(
            "--dtype bfloat16 rounds more than the reference, which --parity reference does not take"
            "; give float16 or float32"
        )
    if config.policy.plain_tower and config.tower_dtype == "fp8":
        raise ValueError(
            "--tower_dtype fp8 rounds more than the reference, which --parity reference does not take"
            "; leave one of the two out"
        )
    if config.policy.recipe_pooling and config.pooling != RECIPE:
        raise ValueError(
            f"--pooling {config.pooling} is not the reference's, which is all that --parity reference takes; give "
            f"{RECIPE}, or leave --parity reference out"
        )


def settings_of(config: ExtractConfig, tower_revision: str, image_size: int, patch_size: int) -> dict[str, Any]:
    """What two extractions must have in common for their features to go together: `VideoFeatures.settings`."""
    return {
        "tower_revision": tower_revision,
        "image_size": image_size,
        "patch_size": patch_size,
        "num_frames": config.num_frames,
        "pooling": config.pooling,
        "conversion": KINDS[config.decoder].conversion,
        "tower_dtype": config.tower_dtype,
    }


class VideoFeatures:
    """What `fastvid extract` does with a video or image: ``features(path)`` is (features, header), or a `DecodeError`.

    It can be pickled: only its settings travel. The tower is loaded, and the decoders are started, by the process that
    first uses it.

    Args:
        config: `ExtractConfig`.

    Attributes:
        encoder, pipeline: once it is open.
        settings: what two extractions must have in common for their features to go together; once it is described.
        shape: [rows, channels] of a video's features; once it is described.
    """

    def __init__(self, config: ExtractConfig):
        self.config = config
        self.encoder: FeatureEncoder | None = None
        self.pipeline: Pipeline | None = None
        self._fidelity: Fidelity | None = None
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[ExtractConfig]]:
        return VideoFeatures, (self.config,)

    def describe(self) -> None:
        """Find out the settings and the shape, which takes neither the tower's weights nor a decoder.

        Raises:
            ValueError: an unusable tower, or flags that do not go together.
        """
        refuse_departures(self.config)
        config = self.config
        image_size, patch_size, channels = tower_sizes(self._tower)
        self.settings = settings_of(config, revisions(self._tower)[0], image_size, patch_size)
        rows = Pooling.parse(config.pooling).rows(config.num_frames, (image_size // patch_size) ** 2)
        self.shape = [rows, channels]

    @property
    def _tower(self):
        return self.config.vision_tower or TOWERS[self.config.llava or "1.5"]

    def open(self) -> Pipeline:
        """Load the tower and make the decoders, unless that was done; the pipeline.

        Raises:
            ValueError: an unusable tower, device or decoder.
        """
        with self._opening:
            if self.encoder is None:
                self.describe()
                self.encoder = self._open_tower()
            if self.pipeline is None:
                self.pipeline = Pipeline(
                    self.encoder,
                    decoder=self.config.decoder,
                    workers=self.config.decode_workers,
                    timeout=self.config.timeout,
                    allow_damaged=self.config.allow_damaged,
                )
            return self.pipeline

    def _open_tower(self) -> FeatureEncoder:
        config, tower = self.config, self._tower
        make = functools.partial(
            FeatureEncoder,
            tower,
            device=config.device or default_device(),
            dtype=getattr(torch, config.dtype) if config.dtype else None,
            batch_size=config.infer_batch,
            num_temporal=config.num_frames,
            pooling=config.pooling,
            plain=config.policy.plain_tower,
        )
        fp8 = config.tower_dtype == "fp8"
        encoder, self._fidelity = make(fp8=fp8), Fidelity(make) if fp8 else None
        self._header = {
            "tower": os.path.abspath(tower) if os.path.isdir(tower) else tower,
            **self.settings,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "fastvid": fastvid.__version__,
        }
        return encoder

    def close(self) -> None:
        """End the decoders, once no thread uses them; a later use opens them again."""
        if self.pipeline is not None:
            self.pipeline.close()
            self.pipeline = None

    def __call__(self, path: StrPath, name: str | None = None) -> tuple[torch.Tensor, dict[str, Any]] | DecodeError:
        """The features of a video. From any thread: `pipeline.at_a_time` of them are decoded side by side.

        Args:
            path: its file.
            name: what the header calls it; default: the file's name.

        Returns:
            ([rows, C] float16, or [P, C] of an image; header), or the `DecodeError` that says why there are
            none.
        """
        self.open()
        try:
            size = os.stat(path).st_size
            prepared = self.prepare(path, name=name)
            return self.encode(path, prepared), self.header(name or os.path.basename(path), size, prepared)
        except DecodeError as error:
            return error
        except OSError as error:
            return DecodeError(path, f"cannot be read ({error.strerror})")

    def extract(self, video: Video) -> dict[str, Any]:
        """Make a video's feature file. From any thread.

        Args:
            video: `fastvid.video.listing.Video`.

        Returns:
            its entry for the manifest (`Manifest.append`).

        Raises:
            OSError: the disk is full.
        """
        start = time.perf_counter()
        try:
            if video.fault is not None:
                raise DecodeError(video.path, video.fault)
            with video.file() as path:
                result = self(path, video.name)
            if isinstance(result, DecodeError):
                raise result
            outcome = {"status": "ok", **self.save(video, *result)}
        except DecodeError as error:
            outcome = {"status": "failed", "reason": error.reason}
        except OSError as error:
            outcome = {"status": "failed", "reason": why_not_written(error)}
        return {"video": video.name, **outcome, "seconds": round(time.perf_counter() - start, 3)}

    def prepare(self, path: StrPath, **options: Any) -> Prepared:
        """Decode a video, with options of `Pipeline.prepare`. From any thread, `pipeline.at_a_time` of them.

        Raises:
            DecodeError: it cannot be decoded.
        """
        assert self.pipeline is not None, "it is not open"
        try:
            return self.pipeline.prepare(path, **options)
        except DecodeError as error:
            hint = "; --allow_damaged True takes it as it is" if error.reason.startswith(_DAMAGED) else ""
            fault = (wrong_content if is_still(path) else no_video)(path) if os.path.isfile(path) else None
            raise DecodeError(path, fault or error.reason + hint) from error

    def encode(self, path: StrPath, prepared: Prepared) -> torch.Tensor:
        """The features of a decoded video alone. From `pipeline.towers` threads.

        Raises:
            DecodeError: they are not finite, or there is no memory for them.
        """
        assert self.pipeline is not None, "it is not open"
        return self._checked(path, prepared, functools.partial(self.pipeline.encode, prepared))

    def finished(self, path: StrPath, prepared: Prepared, features: Features) -> torch.Tensor:
        """The features of a decoded video that came out of `Pipeline.add`. Waits for them; from any thread.

        Raises:
            DecodeError: as `encode`.
        """
        return self._checked(path, prepared, features.result)

    def _checked(self, path, prepared, result):
        try:
            features_RC = result()
        except torch.OutOfMemoryError:
            raise DecodeError(path, "the GPU has no memory for it; give a smaller --infer_batch") from None
        if not features_RC.isfinite().all():
            # They are kept in float16: what is too large for that is so in whatever the tower computes in.
            dtype = self._header["dtype"]
            remedy = "give another --vision_tower" if dtype == "float32" else "try --dtype float32"
            raise DecodeError(path, f"its features are not finite in {dtype}; {remedy}")
        if self._fidelity is not None:
            self._fidelity.compare(os.path.basename(path), prepared, features_RC)
        return features_RC

    def told(self) -> list[str]:
        """Lines on what the tower made of the videos, for the summary."""
        return [] if self._fidelity is None else self._fidelity.told()

    def header(self, name: str, size: int, prepared: Prepared) -> dict[str, Any]:
        """What a feature file says of itself; `size`: bytes of the video's file."""
        frames, info = prepared.info.frames, asdict(prepared.info)
        return {
            **self._header,
            "source": name,
            "source_bytes": size,
            "source_sha256": prepared.sha256,
            "total_frames": frames,
            "frame_indices": frame_indices(frames, self.config.num_frames),
            **({"pooling": OF_AN_IMAGE, "image": info} if prepared.info.still else {"video": info}),
        }

    def save(
        self,
        video: Video,
        features_RC: torch.Tensor,
        header: dict[str, Any],
        before: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Write a video's feature file.

        Args:
            video: `fastvid.video.listing.Video`.
            before: called ahead of the file, with those fields of its manifest entry that are known then.

        Returns:
            the fields of its manifest entry.

        Raises:
            OSError: it cannot be written.
        """
        content = feature_bytes(video.output, features_RC, header)
        folder = Path(self.config.clip_feat_path)
        made = {
            "file": video.output.relative_to(folder).as_posix(),
            "format": self.config.format,
            "tower": header["tower"],
            **self.settings,
            "decoder": header["image" if "image" in header else "video"]["decoder"],
            "source_bytes": header["source_bytes"],
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        video.output.parent.mkdir(parents=True, exist_ok=True)
        if before is not None:
            before(made)
        with atomic_file(video.output) as file:
            file.write(content)
        return {
            "frames": header["total_frames"],
            **made,
            "shape": list(features_RC.shape),
            "written": written(video.output),
        }


def why_not_written(error: OSError) -> str:
    """The reason of a video's failure whose features could not be written.

    Raises:
        OSError: no other video's could be, either.
    """
    if error.errno in NOTHING_MORE_FITS:
        raise error
    return f"its features cannot be written ({error.strerror}: {error.filename})"


def written(path: StrPath) -> list[int]:
    """[size in bytes, modification time in nanoseconds] of a feature file, as its manifest entry has them."""
    there = os.stat(path)
    return [there.st_size, there.st_mtime_ns]


def default_device() -> str:
    """A GPU if there is one: under torchrun the rank's own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
