"""`stillhouse cache`: look at logit caches, verify, repair and remove them.

Only typer is imported here: each command imports what it needs, so that help answers at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.storage.store import format_bytes
from jobs.errors import SpecErrors

if TYPE_CHECKING:
    from cluster.storage import Store

EXAMPLE = "\b\nExample:\n  "  # \b keeps the command on a line of its own
DONE, FAILED = 0, 3
# Sequences of each kind that are read to tell tokens and how much of the distributions is kept.
LISTED, DESCRIBED = 2, 64

app = typer.Typer(
    name="cache",
    help="Look at logit caches, verify, repair and remove them.",
    epilog=EXAMPLE + "stillhouse cache ls",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@app.callback()
def help_alone(context: typer.Context) -> None:
    """Show the help where no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


StorageOption = Annotated[
    str, typer.Option(metavar="URL", help="Where caches given by fingerprint are.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Named = Annotated[
    str,
    typer.Argument(
        metavar="CACHE|SPEC",
        help="A cache's folder, URL or the start of its fingerprint; or a YAML file or bundled "
        "recipe, for the cache that it fills.",
    ),
]
CacheName = Annotated[
    str, typer.Argument(metavar="CACHE", help="Folder, URL, or the start of its fingerprint.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="With SPEC: dotted keys with YAML values.", show_default=False
    ),
]


@app.command("ls", epilog=EXAMPLE + "stillhouse cache ls s3://bucket/runs")
def list_caches(
    storage: Annotated[
        str, typer.Argument(metavar="[STORAGE]", help="The folder or URL that holds the runs.")
    ] = "./runs",
    as_json: JsonOption = False,
) -> int:
    """List the logit caches of a storage.

    Tokens are told by the lengths of a few sequences; the age is that of the cache's beginning.
    """
    from cluster.storage import open_store
    from jobs.caches import show
    from jobs.caches.describe import facts_of, runs_in, users
    from jobs.caches.find import caches_in

    root = open_store(storage)
    runs = runs_in(root)
    rows = []
    for cache in caches_in(root):
        facts = facts_of(cache, LISTED)
        rows.append((facts, users(cache, facts.identity, runs)))
    if as_json:
        _print_json([show.as_json(*row) for row in rows])
    elif rows:
        show.console().print(show.listing(rows))
    else:
        typer.echo(f"{root.url} holds no logit caches")
    return DONE


@app.command(epilog=EXAMPLE + "stillhouse cache info demo cache.k=32")
def info(
    cache: Named,
    overrides: Overrides = None,
    storage: StorageOption = "./runs",
    as_json: JsonOption = False,
) -> int:
    """Describe a logit cache; of a SPEC also its coverage."""
    from dataclasses import asdict

    from jobs.caches import show
    from jobs.caches.describe import coverage_of, facts_of, users
    from jobs.caches.find import find, holds_cache
    from trainer.logits.store import command

    asked = find(cache, overrides or [], storage)
    there = holds_cache(asked.cache)
    if not there and asked.spec is None:
        raise SpecErrors([f"{asked.cache.url}: no such logit cache"])
    facts = facts_of(asked.cache, DESCRIBED)
    if there and facts.mendable:
        mended_by = command("repair", asked.cache)
        _complain([f"{asked.cache.url}: {facts.fault}; mend the cache with: {mended_by}"])
        return FAILED
    if facts.fault and there:
        raise SpecErrors([f"{asked.cache.url}: {facts.fault}"])
    used = users(asked.cache, facts.identity, _runs(asked.cache))
    coverage = coverage_of(asked) if asked.spec is not None else None
    if as_json:
        told = show.as_json(facts, used)
        told["coverage"] = coverage and [
            {**asdict(item), "missing": item.missing} for item in coverage
        ]
        _print_json(told)
        return DONE
    console = show.console()
    typer.echo(f"logit cache {asked.cache.url}")
    if there:
        names = ", ".join(run.name for run in used) or "no run"
        typer.echo(f"{format_bytes(facts.bytes)}, begun {show.age(facts.age)} ago, used by {names}")
        identity = show.table("Identity", "")
        for key, value in facts.identity.items():
            identity.add_row(key, str(value))
        console.print(identity, show.kinds_table(facts))
        for kind in facts.kinds:
            if kind.histogram is not None:
                console.print(show.histogram(kind, kind.histogram))
    else:
        typer.echo(f"is not there yet; fill it with: {_run(cache, overrides)}")
    if coverage is not None:
        console.print(show.coverage_table(coverage))
    elif asked.spec is not None:
        typer.echo(f"the corpus is not prepared; coverage needs: {_run(cache, overrides)}")
    return DONE


@app.command(epilog=EXAMPLE + "stillhouse cache verify demo --sequences 32")
def verify(
    cache: Named,
    overrides: Overrides = None,
    sequences: Annotated[
        int, typer.Option(min=1, help="With SPEC: sequences of each kind that the teacher reruns.")
    ] = 16,
    storage: StorageOption = "./runs",
    as_json: JsonOption = False,
) -> int:
    """Check all bytes; with SPEC also records, against the teacher.

    The teacher runs again over some sequences, in this process. Told are the record error (what
    the coding changed) apart from the truncation error (what the ids left out cost), beside the
    noise floor (the teacher against itself). Exit code 3: damaged or unfaithful.
    """
    from dataclasses import asdict

    from jobs.caches import show
    from jobs.caches import verify as verifying
    from jobs.caches.find import find, holds_cache
    from trainer.logits.repair import check_cache
    from trainer.logits.store import command

    asked = find(cache, overrides or [], storage)
    if not holds_cache(asked.cache):
        raise SpecErrors(
            [f"{asked.cache.url}: no such logit cache; fill it with: {_run(cache, overrides)}"]
        )
    verifying.readable(asked.cache)
    url = asked.cache.url
    _say(f"reading {verifying.size_of(asked.cache)}")
    found = check_cache(asked.cache)
    bad = [damage for damage in found if not damage.harmless]
    told: dict[str, Any] = {"url": url, "damages": [asdict(d) for d in found], "kinds": None}
    if not as_json:
        typer.echo(f"logit cache {url}")
        for damage in found:
            typer.echo(
                f"{'harmless' if damage.harmless else 'damaged'}: {damage.path} {damage.why}"
            )
        typer.echo(f"every file read: {len(bad)} damaged")
    code = FAILED if bad else DONE
    lines = []
    if bad:
        mended_by = command("repair", asked.cache)
        many = "files" if len(bad) > 1 else "file"
        lines = [f"{url}: {len(bad)} damaged {many}; mend the cache with: {mended_by}"]
    if not bad and asked.spec is not None:
        kinds = verifying.faithfulness_of(asked, sequences, _say, _run(cache, overrides))
        told["kinds"] = [verifying.as_json(kind) for kind in kinds]
        if not as_json:
            for kind in kinds:
                show.console().print(verifying.table(kind))
        lines = verifying.faults(asked.cache, kinds, _run(cache, overrides))
        code = FAILED if lines else DONE
    if as_json:
        _print_json({**told, "ok": code == DONE})
    _complain(lines)
    return code


@app.command(epilog=EXAMPLE + "stillhouse cache repair 3fa29c81 --yes")
def repair(cache: CacheName, storage: StorageOption = "./runs", yes: YesOption = False) -> int:
    """Drop what is damaged; the next run captures it again."""
    from jobs.caches import verify as mending
    from jobs.caches import verify as verifying
    from jobs.caches.find import find_cache
    from trainer.logits.repair import check_cache, mend
    from trainer.logits.store import IDENTITY

    place = find_cache(cache, storage)
    verifying.readable(place)
    found = check_cache(place)
    typer.echo(f"logit cache {place.url}")
    if not found:
        typer.echo("every file read: nothing is damaged, nothing to do")
        return DONE
    for damage in found:
        typer.echo(f"{damage.path} {damage.why}")
    for line in mending.consequences(mending.losses(place, found)):
        typer.echo(line)
    if not _confirmed(f"mend {len(found)} file{'s' * (len(found) > 1)}", yes):
        return DONE
    # A codebook comes back for the shards that are left, so those that go, go first.
    for damage in sorted(found, key=lambda damage: not damage.sequences):
        done = mend(place, damage)
        typer.echo(f"{'mended' if done else 'no longer damaged, left alone'}: {damage.path}")
    identities = [run.identity for run in _runs(place)]
    if not place.exists(IDENTITY) and not mending.restore_identity(place, identities):
        typer.echo(f"{IDENTITY} comes back with the next run of a spec that this cache is of")
    left = [d for d in check_cache(place) if not d.harmless and d.path != IDENTITY]
    if left:
        _complain([f"{place.path(left[0].path)} {left[0].why}; {len(left)} files are still bad"])
        return FAILED
    typer.echo("what is left is whole; the next run captures what it lacks")
    return DONE


@app.command("rm", epilog=EXAMPLE + "stillhouse cache rm --unused")
def remove(
    caches: Annotated[
        list[str] | None,
        typer.Argument(metavar="CACHE", help="Folders, URLs, or starts of fingerprints."),
    ] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help="All caches of the storage that no run uses.")
    ] = False,
    storage: StorageOption = "./runs",
    yes: YesOption = False,
) -> int:
    """Delete logit caches, after naming the runs that use them."""
    from cluster.storage import open_store
    from jobs.caches import verify as mending
    from jobs.caches.describe import outline_of, users
    from jobs.caches.find import caches_in, find_cache

    if bool(caches) == unused:
        raise SpecErrors(["CACHE: name some, or give --unused; see stillhouse cache rm --help"])
    if unused:
        places = caches_in(open_store(storage))
    else:
        places = list(dict.fromkeys(find_cache(name, storage) for name in caches or []))
    rows = []
    for place in places:
        facts = outline_of(place)
        used = users(place, facts.identity, _runs(place))
        if not (unused and used):
            rows.append((place, facts, used))
    if not rows:
        typer.echo(f"{open_store(storage).url} holds no logit cache that no run uses")
        return DONE
    for place, facts, used in rows:
        names = ", ".join(run.name for run in used)
        typer.echo(
            f"{place.url}: {format_bytes(facts.bytes)}, "
            + (f"used by {names}, which will need the teacher again" if used else "used by no run")
        )
    if not _confirmed(f"delete {len(rows)} logit cache{'s' if len(rows) > 1 else ''}", yes):
        return DONE
    for place, _, _ in rows:
        mending.remove(place)
        typer.echo(f"deleted: {place.url}")
    return DONE


def _runs(cache: Store) -> list[Any]:
    """The runs of the storage that a cache is in."""
    from jobs.caches.describe import runs_in
    from jobs.caches.find import storage_of

    storage = storage_of(cache)
    return [] if storage is None else runs_in(storage)


def _confirmed(what: str, yes: bool) -> bool:
    """Whether to do it. Raises SpecErrors where nobody can be asked."""
    if yes:
        return True
    try:
        if typer.confirm(f"{what}?"):
            return True
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise SpecErrors([f"{what}: nobody answers here; give --yes"]) from None
    typer.echo("nothing was changed")
    return False


def _run(cache: str, overrides: list[str] | None) -> str:
    """The command that fills the cache of a spec."""
    import shlex

    return shlex.join(["stillhouse", "run", cache, *(overrides or []), "--until", "capture"])


def _complain(lines: list[str]) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)


def _say(line: str) -> None:
    """News of work that takes its time: not on stdout, where JSON may go."""
    print(line, file=sys.stderr)


def _print_json(value: object) -> None:
    from cluster.storage.strict_json import encode

    typer.echo(encode(value, indent=2).decode())
