"""`fastvid extract` on Ray Data: python scripts/extract_ray.py [--actors N] [flags of fastvid extract]

Ray hands the videos to actors on all nodes, one for each GPU; the block of one that dies begins anew. All nodes see the
same folders, to which nothing else may write meanwhile: videos are not leased one by one. Extra: [ray].
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


class Actor:
    def __init__(self, features):
        features.open()
        self.features, self.threads = features, ThreadPoolExecutor(features.pipeline.at_a_time)

    def __call__(self, batch):
        return {"entry": [json.dumps(entry) for entry in self.threads.map(self.features.extract, batch["video"])]}


def rows(todo, config, actors, gpus):
    """What the actors make of the videos, a row each."""
    from fastvid.video.features import VideoFeatures

    blocks = ray.data.from_items(todo, override_num_blocks=max(min(len(todo), 4 * actors), len(todo) // 16))
    return blocks.map_batches(
        Actor,
        fn_constructor_args=(VideoFeatures(config),),
        batch_size=None,
        num_gpus=gpus and 1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    ).iter_rows()


def main(argv=None) -> int:
    from fastvid.config import ExtractConfig
    from fastvid.features.manifest import Manifest
    from fastvid.flags import parse
    from fastvid.video.earlier import EarlierFeatures
    from fastvid.video.features import VideoFeatures
    from fastvid.video.leases import Leases
    from fastvid.video.listing import find_videos

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--actors", type=int)
    own, flags = parser.parse_known_args(argv)
    config = parse(ExtractConfig, flags)
    videos, _ = find_videos(
        config.video_dir_path,
        config.clip_feat_path,
        f".{config.format}",
        follow_links=config.follow_links,
        images=config.images,
    )
    (here := VideoFeatures(config)).describe()
    leases, manifest = Leases(config.clip_feat_path), Manifest(config.clip_feat_path)
    (earlier := EarlierFeatures(config, here.settings, here.shape, manifest)).refuse_other_settings(videos)
    todo = [
        {"video": replace(video, fault=fault)}
        for video in videos
        for _, redo, fault in [earlier.judge(video)]
        if fault or redo != ""
    ]
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": ":".join(sys.path[:2])}})
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors, failed = own.actors or gpus or 1, 0
    with closing(leases), closing(manifest):
        leases.open(), manifest.open(leases)
        for row in rows(todo, config, actors, gpus) if todo else ():
            manifest.append(**(entry := json.loads(row["entry"])))
            failed += entry["status"] == "failed"
    print(f"{len(todo) - failed} extracted, {len(videos) - len(todo)} there already, {failed} failed")
    return int(failed > config.max_failures * len(videos))


if __name__ == "__main__":
    sys.exit(main())
