"""The table of --decoder's values, beside the flag and the classes."""

from typing import get_args, get_type_hints

import pytest
import torch

from fastvid.config import ExtractConfig
from fastvid.video.decode.dali import DaliDecoder
from fastvid.video.decode.kinds import KINDS
from fastvid.video.decode.nvdec import NvDecoder
from fastvid.video.pipeline import _hardware_decoders

CLASSES = {"auto": NvDecoder, "nvdec": NvDecoder, "dali": DaliDecoder}


def test_every_decoder_that_can_be_asked_for_is_known():
    assert set(get_args(get_type_hints(ExtractConfig)["decoder"])) == KINDS.keys() == CLASSES.keys() | {"pyav"}


@pytest.mark.parametrize("name", CLASSES)
def test_colours_are_those_that_the_class_makes(name):
    assert KINDS[name].conversion == CLASSES[name].conversion


def test_a_decoder_without_a_place_in_the_pipeline_is_no_other():
    with pytest.raises(ValueError, match="--decoder other needs a CUDA device, not cpu"):
        _hardware_decoders(torch.device("cpu"), "other", 1, [])
