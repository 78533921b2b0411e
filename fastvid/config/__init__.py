"""What every command accepts: one frozen dataclass per command. `fastvid.flags` fills them.

Flags keep the names of the reference's command line (and so of transformers' ``TrainingArguments``) wherever the
reference has one. A number states its range where it is declared; every dataclass checks its numbers when it is made.
"""

from fastvid.config.answering import ChatConfig, DemoConfig, EmbedConfig, EvaluateConfig, ServeConfig
from fastvid.config.commands import STYLES, ConvertConfig, DoctorConfig, ExportConfig, ExtractConfig
from fastvid.config.fields import LARGEST, flag_of, has_range, older_names, range_fault
from fastvid.config.training import DataConfig, InspectConfig, TrainConfig, ValidateConfig

__all__ = [
    "LARGEST",
    "STYLES",
    "ChatConfig",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "DoctorConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExtractConfig",
    "InspectConfig",
    "ServeConfig",
    "TrainConfig",
    "ValidateConfig",
    "flag_of",
    "has_range",
    "older_names",
    "range_fault",
]
