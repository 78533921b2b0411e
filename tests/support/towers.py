"""Small CLIP and SigLIP towers with random weights, for tests."""

import json


def write_tower(
    folder, *, image_size=28, patch_size=14, hidden_size=32, layers=3, heads=4, seed=0, mean=None, std=None
):
    """Save a seeded CLIP vision tower as a Hugging Face folder; a preprocessor_config.json if `mean` is given."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = CLIPVisionModel(config)
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    tower.save_pretrained(folder)
    if mean:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    return folder


def write_narrow_tower(folder, seed, width, patch_size=14):
    """Save a seeded CLIP vision tower of two layers, of as many channels as the features of a small run have."""
    return write_tower(folder, patch_size=patch_size, hidden_size=width, layers=2, heads=2, seed=seed)


def write_siglip(
    folder,
    *,
    image_size=30,
    patch_size=14,
    hidden_size=48,
    intermediate_size=80,
    layers=4,
    heads=3,
    seed=0,
    settings=None,
    std=0.3,
):
    """Save a seeded SigLIP vision tower as a Hugging Face folder, and `settings` as its preprocessor_config.json.

    Returns:
        transformers' model.
    """
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = SiglipVisionModel(config).eval()
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=std)
    tower.save_pretrained(folder)
    if settings:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return tower


def write_dino(folder, kind, *, side=28, layers=3, seed=0, preprocessor=None, **settings):
    """Save a seeded DINOv2 or DINOv3 tower whose config.json says 28 pixels, and a preprocessor_config.json.

    Args:
        kind: model_type.
        side: pixels of the pictures that `preprocessor` makes, where that is not given.

    Returns:
        transformers' model.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    sizes = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": layers}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=4, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = AutoModel.from_config(config).eval()
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    tower.save_pretrained(folder)
    made = {"size": {"height": side, "width": side}} if preprocessor is None else preprocessor
    (folder / "preprocessor_config.json").write_text(json.dumps(made))
    return tower
