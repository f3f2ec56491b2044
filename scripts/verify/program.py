"""Puts a proof together: what is run, what is compared with what, and in which order it is told."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from babl.errors import UserError
from babl.models.weights import Family
from babl.scripts.verify.edit import LOOP, is_stock, line_rows, seen_rows
from babl.scripts.verify.itself import MOVED, compared_rows, resume_row, statement_rows
from babl.scripts.verify.observed import WATCHED, observed_rows
from babl.scripts.verify.runs import Case, Job, config_of, cut, every_case, missing, quick_cases, run_all, weights
from babl.scripts.verify.statements import Statements
from babl.scripts.verify.stock import case_rows, tried
from babl.scripts.verify.subject import Subject
from babl.scripts.verify.table import Row, failed, skipped


@dataclass
class Request:
    """What is to be proven.

    Attributes:
        script: Takes what scripts/train.py takes.
        cases: To be run from beginning to end.
        after: Cases of these to be run again from the checkpoint of a step, as if killed thereafter.
        watch: Whether dropout and order are observed, too, in a longer run.
        itself: Whether the script is held against itself instead of the stock loop.
        said: Of its parameters, by the user.
        base: With `itself`, the loop whose first step says how far parameters move at the full rate.
        ignored: Keys of metrics.jsonl that may depend on how a step is split.
        overrides: The user's own `section.key=value`.
    """

    script: Path = LOOP
    cases: Sequence[Case] = ()
    after: Sequence[tuple[Case, int]] = ()
    watch: bool = False
    itself: bool = False
    said: Statements = field(default_factory=Statements)
    base: Path = LOOP
    ignored: Sequence[str] = ()
    overrides: Sequence[str] = ()


def chosen_cases(quick: bool, family: Family | None) -> tuple[list[Case], list[tuple[Case, int]]]:
    """Returns the cases to run and those to go on with; all of one family, where one is named."""
    cases, after = quick_cases() if quick else every_case()
    if family is None:
        return cases, after
    return [case._replace(family=family) for case in cases], [(c._replace(family=family), s) for c, s in after]


class Runs:
    """The runs of a proof: made one by one, run together."""

    def __init__(self, request: Request, folder: Path):
        self.request, self.folder = request, folder
        self.subjects: dict[tuple[Family, float], Subject] = {}
        self.made = 0
        self.waiting: list[Job] = []

    def subject(self, family: Family, moved: float = 0.0) -> Subject:
        """Returns what a family is run on."""
        if (family, moved) not in self.subjects:
            self.subjects[family, moved] = Subject(family, self.folder / f"{family}{moved or ''}", moved)
        return self.subjects[family, moved]

    def new(self, case: Case, script: Path | None = None, moved: float = 0.0) -> Job:
        """Returns a run of the script in question, or of another one, that will be made."""
        subject, own = self.subject(case.family, moved), script is None
        job = Job(
            case, subject, self._place(), script or self.request.script, {}, self.request.overrides if own else ()
        )
        taken = [f"{section}.{key}" for section, keys in config_of(job).items() for key in keys]
        for override in job.overrides:
            if override.partition("=")[0] in taken:
                raise UserError(f"{override}: verify sets {override.partition('=')[0]} itself")
        self.waiting.append(job)
        return job

    def watched(self, case: Case) -> Job:
        """Returns a longer run of small steps, somebody watching."""
        job = self.new(case)
        job.record = job.folder.with_suffix(".npz")
        job.changes = {
            "batch": {"tokens": job.subject.longest},
            "train": {"steps": WATCHED, "save_every": 0, "validate_every": WATCHED // 2, "preflight": False},
        }
        return job

    def gone_on(self, job: Job, step: int) -> Job:
        """Returns the run that goes on with this one after a step."""
        self.waiting.append(cut(job, step, self._place()))
        return self.waiting[-1]

    def go(self) -> None:
        """All have run."""
        with tqdm(total=len(self.waiting), desc=str(self.request.script), unit="run", leave=False) as bar:
            run_all(self.waiting, bar)
        self.waiting = []

    def _place(self) -> Path:
        self.made += 1
        return self.folder / f"run{self.made}"


def prove(request: Request) -> list[Row]:
    """Returns every comparison.

    Raises:
        UserError: There is no such script, a statement is about no parameter, or an override about what is fixed here.
    """
    for script in (request.script, request.base):
        if not script.is_file():
            raise UserError(f"{script}: no such script")
    lacking = {case: missing(case) for case in request.cases}
    able = [case for case in request.cases if not lacking[case]]
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs(request, Path(temporary))
        jobs = {case: runs.new(case) for case in able}
        request.said.check(name for subject in runs.subjects.values() for name in weights(subject.folder))
        stock = runs.new(able[0], LOOP) if able and not is_stock(request.script) else None
        watched = runs.watched(Case(able[0].family, "ddp", 1, 1)) if able and request.watch else None
        whole = _whole(runs, able) if request.itself else {}
        runs.go()
        left = [(job, step) for case, step in request.after if (job := jobs.get(case)) and step in job.saved()]
        resumed = [(job, step, runs.gone_on(job, step)) for job, step in left if not job.failure]
        runs.go()
        rows = _edit_rows(jobs[able[0]], stock) if stock else []
        rows += _watched_rows(watched, request) if watched else []
        for case, why in lacking.items():
            if why:
                rows.append(skipped("run", str(case), why))
            elif request.itself:
                reference, moved, base = whole[case.family]
                rows += compared_rows(jobs[case], reference, moved, request.ignored)
                rows += statement_rows(jobs[case], base, request.said)
            else:
                rows += case_rows(jobs[case], request.said)
        return rows + [resume_row(*each) for each in resumed]


def _whole(runs: Runs, able: Sequence[Case]) -> dict[Family, tuple[Job, Job, Job | None]]:
    """Returns each family's reference, the same from weights that are moved, and the base where a rate is stated."""
    found: dict[Family, tuple[Job, Job, Job | None]] = {}
    for family in dict.fromkeys(case.family for case in able):
        one = Case(family, "ddp", 1, 1)
        base = runs.new(one, runs.request.base) if runs.request.said.rates else None
        found[family] = runs.new(one), runs.new(one, moved=MOVED), base
    return found


def _edit_rows(job: Job, stock: Job) -> list[Row]:
    """Returns what the edit changes, in its lines and in what is seen of it."""
    found = tried("seen", str(job.case), lambda: [*line_rows(job.script), *seen_rows(job, stock)])
    return [found] if isinstance(found, Row) else found


def _watched_rows(job: Job, request: Request) -> list[Row]:
    name = f"{job.case.family}, {WATCHED} steps"
    if job.failure or job.record is None:
        return [failed("dropout", name, job.failure)]
    record = job.record
    found = tried("dropout", name, lambda: observed_rows(record, job.subject, name, not request.itself))
    return [found] if isinstance(found, Row) else found
