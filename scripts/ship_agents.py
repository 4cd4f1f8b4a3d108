"""Put a trained checkpoint into the package, where `microglia generate --model NAME` finds it.

    python scripts/ship_agents.py runs/demo/checkpoint reasoner
    python scripts/ship_agents.py results/llm/smollm2/agents+recovery-0 smollm2 --keep-ratio 0.8

Weights of agents and recovery are stored in 16 bits, which halves them and changes decisions at ties at most;
statistics and calibration logits stay as they are.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from microglia.checkpoint import Checkpoint
from microglia.checkpoint.shipped import PLACE

MOST = 8 * 2**20  # bytes of all of them together


def main() -> None:
    """Read, halve, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name", help="of the model, as microglia knows it")
    parser.add_argument("--keep-ratio", type=float, help="share of the heads kept unless somebody says otherwise")
    options = parser.parse_args()
    saved = Checkpoint.from_pretrained(options.checkpoint)
    if saved.config.base_model != options.name:
        raise SystemExit(f"{options.checkpoint} was trained on {saved.config.base_model}, not on {options.name}")
    pruner = saved.pruner.at(options.keep_ratio)
    for part in (pruner.policy, pruner.recovery):
        for parameter in part.parameters() if part is not None else ():
            parameter.data = parameter.data.half()
    config = replace(saved.config, threshold=pruner.gate.threshold)
    folder = replace(saved, pruner=pruner, config=config).save_pretrained(PLACE / options.name)
    total = sum(file.stat().st_size for file in PLACE.rglob("*") if file.is_file())
    print(f"{folder}; all agents together {total / 2**20:.1f} MiB")
    if total > MOST:
        raise SystemExit(f"that is more than {MOST / 2**20:.0f} MiB; train with a lower rank of the recovery")


if __name__ == "__main__":
    main()
