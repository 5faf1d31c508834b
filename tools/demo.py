"""What a learned reward is good for, in minutes: drafts, of which half were edited, four ways.

    python tools/demo.py --out runs/demo

A small model from nothing answers a word by copying it, its habit, and now and then backwards, as
asked. It drafts answers to 512 words, and an editor gets through half of them. sft, irft and rft
learn from all 512, three seeds each, and once more where all were edited. Their settings were
chosen on another seed (``studies/unedited.yaml``). Stopped at any time, the same command goes on
where it was.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# A thread a run, before torch is loaded: more of them than cores wait for each other, spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from studies.page import write_page  # noqa: E402
from studies.points import answers  # noqa: E402
from studies.report import picture, short_table  # noqa: E402
from studies.study import read_study, run_study  # noqa: E402

WORDS = 3  # shown, with every method's greedy answer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--study", type=Path, default=ROOT / "studies" / "demo.yaml")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="runs at a time, of one thread each")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    out = options.out.resolve()
    study = read_study(options.study)
    print(f"{study.hypothesis.strip()}\n", flush=True)
    results = run_study(study, out, options.jobs)
    level, *_ = study.levels
    said = {
        method.name: answers(study.point(level, method, method.trials()[0], study.seeds[0]), out)
        for method in study.methods
    }
    words = list(next(iter(said.values())))[:WORDS]
    samples = [(word, {name: found[word] for name, found in said.items()}) for word in words]
    picture(results, out / "results.png")
    table = short_table(results)
    (out / "results.md").write_text(table + "\n")
    page = write_page(results, samples, out)
    print(f"\n{table}\n")
    for word, texts in samples:
        print(f"{word}: " + ", ".join(f"{name} {text}" for name, text in texts.items()))
    print(f"\npage: {page}\nruns: {out / 'points'} (recipe, log and report of each)")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
