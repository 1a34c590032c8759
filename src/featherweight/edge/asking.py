"""`place` for people: names, files and quantities as text become a Question, and its answer with break-evens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from featherweight.core import Profile
from featherweight.edge import links, prices
from featherweight.edge import place as placing
from featherweight.edge.breakeven import BreakEven, break_evens
from featherweight.edge.links import Link
from featherweight.edge.place import Goal, Load, Place, Placement, Question, Rules
from featherweight.edge.prices import Offer, PriceTable
from featherweight.errors import BudgetError, DataError
from featherweight.quantities import parse_count, parse_latency, parse_size
from featherweight.runtime.targets import load_profile

CLOUDS = ("aws-cpu", "aws-gpu", "aws-serverless")
EDGE, ONPREM = "edge-mini", "onprem-cpu"
NONE = "none"
DEVICE = "device"


@dataclass(frozen=True)
class Asked:
    """What was asked, the answer, and where the cheapest changes with the load."""

    question: Question
    placement: Placement
    break_evens: tuple[BreakEven, ...]
    prices: PriceTable

    @property
    def ok(self) -> bool:
        """True if an option keeps the rules."""
        return self.placement.answer == "yes"


def place(
    model: str | Path,
    *,
    device: str | Path | Profile,
    requests: str | float,
    compressed: Sequence[str | Path] = (),
    link: str | Link = "4g",
    edge_link: str | Link = "wifi",
    onprem_link: str | Link | None = None,
    edge: str = EDGE,
    onprem: str = ONPREM,
    clouds: Sequence[str] = CLOUDS,
    devices: int = 1,
    peak: float = 3.0,
    own_devices: bool = False,
    upload: str | int | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    wire: Literal["float", "int8"] = "float",
    rules: Rules | None = None,
    goal: Goal | None = None,
    price_files: Sequence[Path] = (),
    measured: Mapping[str, str | float] | None = None,
    not_private: Sequence[str] = (),
    free_shares: bool = True,
) -> Asked:
    """Compare where a model can run: device, edge server, own server, clouds, and the best splits.

    Args:
        model: the original ONNX file.
        device: a profile's name or file, or a Profile.
        requests: a month, as "3M" or a number.
        compressed: other forms of the model, each placed too; named by their files.
        link: to the clouds, see `edge.links.parse_link`; `edge_link` to the edge server; `onprem_link` to own servers
            (None: as `link`).
        edge, onprem, clouds: names of offers in the price tables; "none" leaves one out.
        devices: how many share the requests; `own_devices` counts their price and power as money.
        peak: the busiest rate over the mean.
        upload: bytes an app really sends a server for one call (a JPEG, say); None: the input tensors as they are.
        wire: how what the device has computed is sent.
        goal: what is best; None: cost if latency is limited, else latency.
        measured: milliseconds of a whole call by "PLACE" or "PLACE/MODEL" ("device": "12ms").
        free_shares: count what a cloud gives free each month, as if nothing else used it.
        not_private: inputs that need not be protected by `rules.data_stays`.

    Raises:
        DataError: an unknown profile, offer or link, or a bad file; BudgetError: a bad quantity.
    """
    table = prices.load(price_files)
    if not free_shares:
        table = dataclasses.replace(table, offers={n: prices.without_free(o) for n, o in table.offers.items()})
    rules = rules or Rules()
    places = _places(table, _link(link), _link(edge_link), _link(onprem_link or link), edge, onprem, clouds)
    works = placing.models(
        _names(Path(model), [Path(p) for p in compressed]),
        input_shapes=input_shapes or {},
        upload_bytes=None if upload is None else parse_size(upload),
    )
    names = [w.name for w in works]
    question = Question(
        works=works,
        device=device if isinstance(device, Profile) else load_profile(device),
        places=places,
        load=Load(parse_count(requests), peak=peak, devices=devices, own_devices=own_devices),
        rules=rules,
        goal=goal or ("cost" if rules.max_latency_ms is not None else "latency"),
        per_kwh=table.per_kwh,
        wire=wire,
        measured_ms=_measured(measured or {}, [DEVICE, *(p.name for p in places)], names),
        not_private=frozenset(not_private),
    )
    _check_inputs(question)
    answer = placing.place(question)
    return Asked(question, answer, break_evens(question, answer), table)


def _link(given: str | Link) -> Link:
    return given if isinstance(given, Link) else links.parse_link(given)


def _places(
    table: PriceTable, link: Link, edge_link: Link, onprem_link: Link, edge: str, onprem: str, clouds: Sequence[str]
) -> list[Place]:
    found = []
    if edge != NONE:
        found.append(Place("edge", _owned(table, edge), edge_link))
    if onprem != NONE:
        found.append(Place("on-premises", _owned(table, onprem), onprem_link))
    found += [Place(name, table.get(name), link) for name in clouds if name != NONE]
    twice = sorted({p.name for p in found if sum(q.name == p.name for q in found) > 1})
    if twice:
        raise DataError(f"each place may be given once, but {', '.join(twice)} is there twice")
    return found


def _owned(table: PriceTable, name: str) -> Offer:
    offer = table.get(name)
    if offer.kind != "owned":
        own = sorted(n for n, o in table.offers.items() if o.kind == "owned")
        raise DataError(f"a server of one's own must be an offer of kind owned ({', '.join(own)}), but got {name!r}")
    return offer


def _names(original: Path, compressed: Sequence[Path]) -> dict[str, Path]:
    """A short name for each form: original, compressed, or the files' names where there are several."""
    found = {"original": original}
    for path in compressed:
        name = "compressed" if len(compressed) == 1 else path.stem
        while name in found:
            name += "'"
        found[name] = path
    return found


def _measured(
    given: Mapping[str, str | float], places: Sequence[str], models: Sequence[str]
) -> dict[tuple[str, str], float]:
    found = {}
    for key, value in given.items():
        where, _, model = key.partition("/")
        if where not in places or (model and model not in models):
            raise DataError(
                f"a measured time is for one of the places {', '.join(places)} and, after a '/', one of the models "
                f"{', '.join(models)}, but got {key!r}"
            )
        ms, _ = parse_latency(value)
        if ms is None:
            raise BudgetError(f"a measured time must have the unit ms or s, but got {value!r}")
        found[where, model] = ms
    return found


def _check_inputs(question: Question) -> None:
    inputs = {t.name for w in question.works for t in w.graph.tensors if t.is_input}
    unknown = sorted(question.not_private - inputs)
    if unknown:
        raise DataError(f"what need not be private must be an input ({', '.join(sorted(inputs))}), but got {unknown}")
