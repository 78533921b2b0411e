"""fastvid: fast training of video-chat models of the Video-ChatGPT / PG-Video-LLaVA family."""

__version__ = "0.1.0"
