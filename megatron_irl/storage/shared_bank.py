"""A pair bank that is the same on every rank: rank 0 says what there is, everybody reads just that.

Each rank looking into the folder for itself could see different things (a network file system
shows another host's files late), and ranks that train on different pairs diverge in silence.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_irl.data.bank_repair import bring_up_to_date, restore_manifest, settle
from megatron_irl.data.pair_bank import Bounds, Manifest, PairBank
from megatron_irl.data.pair_table import Part
from megatron_irl.errors import UserError
from megatron_irl.parallel.main_rank import on_main
from megatron_irl.parallel.topology import Topology
from megatron_irl.types import Demonstration, Pair

PATIENCE_SECONDS = 60.0  # how late a rank may see what another one committed


class SharedBank(PairBank):
    """As ``PairBank``, for the ranks of one run.

    Collective over every rank: ``open``, ``begin_round``, ``discard_others`` and ``finish_round``.
    The others are not: ``write_part`` may be called by one rank for each part, and what is read is
    checked against the manifest that rank 0 gave everyone, rows and digest. A finished round is
    visible to ``parts``, ``read_part``, ``read_round`` and ``has_references`` once ``open`` or
    ``finish_round`` has returned.
    """

    def __init__(
        self, root: str | Path, seed: int, topology: Topology,
        fence: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(root, seed, fence)
        self.topology = topology
        self.patience = PATIENCE_SECONDS if topology.world_size > 1 else 0.0
        self._disk = PairBank(root, seed, fence)  # what rank 0 sees
        self._known: dict[int, Manifest] = {}
        self._written: dict[int, dict[int, Part]] = {}  # by this rank, since the last manifest

    def open(self, round: int, *, inside: bool, required: bool = False) -> None:
        """Bring the bank to where a resumed run goes on: in ``round``, later ones are removed.

        Files of release 0.1.0 are rewritten, manifests are brought level with parts rewritten
        before a kill, and the round's parts are verified. Collective.

        Args:
            inside: The round has taken steps, so its samples cannot be drawn again. Otherwise what
                is missing or damaged is reopened, to be sampled to the same.
            required: The round must be there and finished if ``inside``.

        Raises:
            UserError: A part of a round in progress is missing or damaged, by file.
        """
        # Manifests are small (a line for each part), so that all of them can go to every rank.
        self._known = on_main(lambda: self._prepare(round, inside, required), self.topology)
        self._written = {}

    def begin_round(self, round: int, bounds: Bounds) -> list[tuple[int, int]]:
        """Plan a round; returns the plan that holds, on every rank. Collective."""
        self._written.pop(round, None)
        plan = on_main(lambda: self._disk.begin_round(round, bounds), self.topology)
        if sorted(self._known.get(round) or ()) != list(range(len(plan))):
            self._known.pop(round, None)  # finished under another plan
        return plan

    def discard_others(
        self, round: int, parts: Sequence[Sequence[Demonstration]],
        on_part: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Remove parts that are not of these demonstrations, or damaged. Collective.

        Args:
            on_part: Called on rank 0 before each part is read.

        Returns:
            The numbers of those that are left, as rank 0 finds them by reading all.
        """
        return on_main(lambda: self._disk.discard_others(round, parts, on_part), self.topology)

    def write_part(self, round: int, part: int, pairs: Sequence[Pair]) -> Part:
        """Commit a part. Any rank may, each part by one of them; not collective."""
        entry = super().write_part(round, part, pairs)
        self._written.setdefault(round, {})[part] = entry
        return entry

    def finish_round(self, round: int, parts: Iterable[Part] | None = None) -> Manifest:
        """Commit the manifest: parts written by any rank since, the others as they were.

        To be called when every rank has written its parts, of a new round or new versions.
        Digests come from the ranks that wrote, not from files that rank 0 may see late. Collective.
        """
        # Popped, so that what is written from here on belongs to the next manifest.
        mine = self._written.pop(round, {}) | {part.number: part for part in parts or ()}
        written: list[dict[int, Part]] = [mine]
        if self.topology.world_size > 1:
            written = [{} for _ in range(self.topology.world_size)]
            dist.all_gather_object(written, mine)  # also: nobody is writing any more

        def commit() -> Manifest:
            known = dict(self._known.get(round) or {})
            if not known:  # parts that an earlier start of the run committed
                news = {number for each in written for number in each}
                known = {n: self._disk.describe(round, n) for n in self._disk.parts(round)
                         if n not in news}
            for each in written:
                known |= each
            return self._disk.finish_round(round, known.values())

        self._known[round] = on_main(commit, self.topology)
        return self._known[round]

    def manifest(self, round: int) -> Manifest | None:
        """The round's parts as every rank knows them; None while it is not finished."""
        return self._known.get(round)

    def parts(self, round: int) -> list[int]:
        """The numbers of a finished round's parts, ascending; none while it is not finished."""
        return sorted(self._known.get(round) or ())

    def is_finished(self, round: int) -> bool:
        """Whether the round has its manifest."""
        return round in self._known

    def _prepare(self, round: int, inside: bool, required: bool) -> dict[int, Manifest]:
        disk = self._disk
        disk.discard_after(round)
        known: dict[int, Manifest] = {}
        for number in disk.rounds():
            bring_up_to_date(disk, number)
            if number < round:  # a later round may train on it too
                restore_manifest(disk, number)
            elif wrong := settle(disk, number):
                if inside:
                    raise UserError(wrong)
                disk.reopen(number)
            manifest = disk.manifest(number)
            if manifest is not None:
                known[number] = manifest
        if inside and required and round not in known:
            raise UserError(
                f"{self.root} lacks pairs of round {round}, which the newest checkpoint is in the "
                "middle of: the policy that they were sampled from is gone. Restore "
                f"{self.root / f'round_{round:04d}'}, remove the newer checkpoints under "
                "checkpoints/ to go back to the round's start, or set a new output_dir."
            )
        return known
