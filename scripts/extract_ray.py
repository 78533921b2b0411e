"""`fastvid extract` on Ray Data: python scripts/extract_ray.py [--actors N] [flags of fastvid extract]

Ray hands the videos to actors on all nodes, by default one for each GPU; what a dead one had in hand begins anew. All
nodes see the same folders. Files are as `fastvid extract` makes them, and only what is missing is made. Extra: [ray].
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
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


def main(argv=None) -> int:
    from fastvid.extract import EarlierFeatures, ExtractConfig, Leases, Manifest, VideoFeatures, find_videos, parse

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--actors", type=int)
    own, flags = parser.parse_known_args(argv)
    config = parse(ExtractConfig, flags)
    videos, _ = find_videos(
        config.video_dir_path, config.clip_feat_path, f".{config.format}", follow_links=config.follow_links)
    (here := VideoFeatures(replace(config, device="cpu"))).open(decoders=False)
    leases, manifest = Leases(config.clip_feat_path), Manifest(config.clip_feat_path)
    earlier = EarlierFeatures(config, here.settings, here.shape, manifest)
    earlier.refuse_other_settings(videos)
    todo = [{"video": replace(video, fault=fault)} for video in videos
            for _, redo, fault in [earlier.judge(video)] if fault or redo != ""]
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": ":".join(sys.path[:2])}})
    gpus = int(ray.cluster_resources().get("GPU", 0))
    leases.open(), manifest.open(leases)
    actors, failed = own.actors or gpus or 1, 0
    blocks = max(min(len(todo), 4 * actors), len(todo) // 16)  # a dead actor costs the block that it had in hand
    for row in ray.data.from_items(todo, override_num_blocks=blocks).map_batches(
            Actor, fn_constructor_args=(VideoFeatures(config),), batch_size=None, num_gpus=gpus and 1,
            compute=ray.data.ActorPoolStrategy(size=actors)).iter_rows() if todo else ():
        manifest.append(**(entry := json.loads(row["entry"])))
        failed += entry["status"] == "failed"
    manifest.close(), leases.close()
    print(f"{len(todo) - failed} extracted, {len(videos) - len(todo)} there already, {failed} failed")
    return int(failed > config.max_failures * len(videos))


if __name__ == "__main__":
    sys.exit(main())
