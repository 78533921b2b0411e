"""Frames to features: patchify → CLIP tower up to its last layer but one → spatio-temporal pooling.

Dimensions: T frames, B frames per pass, P patches per frame, K pixel values per patch, C channels.

The features are those of PG-Video-LLaVA (336-pixel tower) and Video-ChatGPT (224): ``hidden_states[-2][:, 1:]`` of
``CLIPVisionModel`` in fp16, pooled.
"""

import os

import torch
from fastvid_kernels import frame_patchify, spatio_temporal_pool
from torch.nn.functional import linear

from fastvid.files import shown, wrong_content
from fastvid.folders import is_url
from fastvid.video.tower import is_path, revisions


def open_device(name=None) -> torch.device:
    """The torch device that a user means; by default a GPU if there is one.

    Raises:
        ValueError: this machine, or this build of torch, has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); cpu can be used everywhere") from error


def make_current(device):
    """Make a GPU the process's current one: else it would open a context, and pin memory, on the first GPU as well.

    For commands, whose process is their own: a library's caller chooses his own current GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


class FeatureEncoder:
    """A CLIP vision tower that turns a video's frames into its features.

    Every pass of the tower has the same number of frames, the last one padded, because the rows of a matrix product
    depend on how many there are: so a video's features depend on nothing but its frames.

    Args:
        tower: Hugging Face folder or hub id of a CLIP model or vision tower.
        device: default: a GPU if there is one.
        dtype: precision of the tower. Default: float16 on a GPU, float32 on a CPU.
        batch_size: most frames per pass; evened out, so that 100 frames at 32 are four passes of 25.
        num_temporal: most frames per video, and temporal rows of the features.

    Attributes:
        image_size, patch_size: pixels; num_patches: P; hidden_size: C.
        revision: what identifies the weights: hub commit, or hash of the folder's files.

    Raises:
        ValueError: the tower is missing, or is not a CLIP vision tower; the device is none of this machine's.
    """

    def __init__(self, tower, *, device=None, dtype=None, batch_size=32, num_temporal=100):
        if batch_size < 1 or num_temporal < 1:
            raise ValueError(f"batch size ({batch_size}) and frames per video ({num_temporal}) must be at least 1")
        self.device = open_device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)
        self.num_temporal = num_temporal
        self.batch_size = -(-num_temporal // -(-num_temporal // batch_size))
        model = load_tower(tower, self.dtype)
        self.image_size, self.patch_size = model.config.image_size, model.config.patch_size
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.hidden_size = model.config.hidden_size
        settings = processor_settings(tower)
        self.mean, self.std = settings["image_mean"], settings["image_std"]
        self.revision = revisions(tower)[0]

        embeddings = model.embeddings
        position_1PC = embeddings.position_embedding.weight
        self._patch_weight_CK = embeddings.patch_embedding.weight.flatten(1).to(self.device)
        self._class_row_C = (embeddings.class_embedding + position_1PC[0]).detach().to(self.device)
        self._position_PC = position_1PC[1:].detach().to(self.device)
        self._first_norm = model.pre_layrnorm.to(self.device)
        self._layers = model.encoder.layers[:-1].to(self.device)

    @torch.no_grad()
    def encode(self, frames):
        """The features of one video.

        Args:
            frames: [T, H, W, 3] uint8 RGB, tensor or array, 1 ≤ T ≤ num_temporal, any H and W.

        Returns:
            [num_temporal + P, C] float16, on the CPU: frame means, zero rows up to num_temporal, position means.

        Raises:
            ValueError: no frames, or too many.
        """
        frames = torch.as_tensor(frames)
        if not 1 <= len(frames) <= self.num_temporal:
            raise ValueError(f"a video must have 1 to {self.num_temporal} frames, found {len(frames)}")
        states_TPC = torch.empty(len(frames), self.num_patches, self.hidden_size, dtype=torch.float16,
                                 device=self.device)
        for part_BHW3, states_BPC in zip(frames.split(self.batch_size), states_TPC.split(self.batch_size)):
            patches_BPK = frame_patchify(part_BHW3.to(self.device), size=self.image_size, patch=self.patch_size,
                                         mean=self.mean, std=self.std, dtype=torch.float16).to(self.dtype)
            states_BPC.copy_(self._tower(patches_BPK)[:, 1:])
        return spatio_temporal_pool(states_TPC, num_temporal=self.num_temporal).cpu()

    def _tower(self, patches_BPK):
        """States [B, 1 + P, C] after the last layer but one."""
        count, padded = len(patches_BPK), patches_BPK.new_zeros(self.batch_size, *patches_BPK.shape[1:])
        padded[:count] = patches_BPK
        patch_rows = linear(padded, self._patch_weight_CK) + self._position_PC
        class_rows = self._class_row_C.expand(self.batch_size, 1, -1)
        states = self._first_norm(torch.cat([class_rows, patch_rows], dim=1))
        for layer in self._layers:
            states = layer(states, None)
        return states[:count]


def load_tower(tower, dtype):
    """The CLIPVisionModel of a folder or hub id, in evaluation mode, on the CPU.

    Raises:
        ValueError: it is missing or damaged, or is no CLIP vision tower.
    """
    from safetensors import SafetensorError
    from transformers import CLIPVisionModel, logging

    if is_url(tower) or os.path.isfile(tower):
        what = "a URL" if is_url(tower) else "a file"
        raise ValueError(f"--vision_tower {shown(tower)} is {what}; give the tower's folder, or its name on the hub")
    if is_path(tower) and not os.path.isdir(tower):
        raise ValueError(f"--vision_tower {shown(tower)}: no such folder; give the tower's, which `hf download "
                         "openai/clip-vit-large-patch14-336 --local-dir FOLDER` makes")
    for path in _files(tower):
        if fault := wrong_content(path):
            raise ValueError(f"{path} {fault}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise a CLIP model's unused text tower is listed weight by weight
    try:
        model, info = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        meant_a_folder = is_path(tower) or os.path.isdir(os.path.dirname(tower))
        hub_id = "openai/clip-vit-large-patch14-336" if meant_a_folder else tower
        raise ValueError(
            f"cannot load the vision tower {tower!r} ({str(error).strip().splitlines()[0]}); download it where there "
            f"is a network with `hf download {hub_id} --local-dir FOLDER` and pass --vision_tower FOLDER") from error
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"{tower!r} is not a CLIP vision tower: it has no weights for "
                         f"{', '.join(sorted(info['missing_keys'])[:3])}, …")
    return model.eval()


def _files(tower):
    """Configuration and weights of a tower's folder; of a hub id none."""
    names = ("config.json", "model.safetensors", "pytorch_model.bin")
    return [path for name in names if os.path.lexists(path := os.path.join(tower, name))]


def processor_settings(tower):
    """A tower's preprocessor_config.json; "image_mean" and "image_std" per channel are CLIP's where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(tower)
    except OSError:
        settings = {}
    return {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, **settings}
