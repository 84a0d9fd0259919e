"""Retention once more, written from the contract alone and in another way: which copies the rules hold, and which a directory
with increments must keep."""

from datetime import date, timedelta
from typing import Any, Dict, List, NamedTuple, Sequence, Set

from support.values import US_UUID
from VmBackup import Copy, Method, Rules

MONDAY = date(2001, 1, 1)                 # a Monday, as every calendar has it


class Told(NamedTuple):
    """What the contract says of a directory: what goes, and the rules that hold each copy that is counted."""
    gone: Set[str]
    held: Dict[str, Set[str]]


def day_number(copy: Copy) -> int:
    return copy.taken_at.toordinal() - MONDAY.toordinal()


def week_word(number: int) -> str:
    """The week so many weeks after that of MONDAY: it belongs to the year that its Thursday is in."""
    thursday = MONDAY + timedelta(days=7 * number + 3)
    nth_day = (thursday - date(thursday.year, 1, 1)).days
    return 'week %04d-W%02d' % (thursday.year, nth_day // 7 + 1)


#: For each unit: the periods' number, and what the period of a number is called.
UNITS = {
    'daily': (day_number, lambda number: 'day ' + str(MONDAY + timedelta(days=number))),
    'weekly': (lambda copy: day_number(copy) // 7, week_word),
    'monthly': (lambda copy: copy.taken_at.year * 12 + copy.taken_at.month - 1,
                lambda number: 'month %04d-%02d' % (number // 12, number % 12 + 1)),
    'yearly': (lambda copy: copy.taken_at.year, 'year %04d'.__mod__)}  # type: Dict[str, Any]


def newest_first(copies: Sequence[Copy]) -> List[Copy]:
    """In the order in which they were made; of the older program by the stamp."""
    ours = sorted((copy for copy in copies if not copy.is_old), key=lambda copy: copy.sequence)
    rank = {own.name: (position, 1, own.taken_at) for position, own in enumerate(ours)}
    for copy in copies:
        if copy.is_old:
            before = next((position for position, own in enumerate(ours) if own.taken_at > copy.taken_at), len(ours))
            rank[copy.name] = (before, 0, copy.taken_at)
    return sorted(copies, key=lambda copy: rank[copy.name], reverse=True)


def is_full(copy: Copy) -> bool:
    """Can it be restored without any other?"""
    return not copy.layer or not copy.layer.base


def is_sound(copy: Copy) -> bool:
    return not (copy.problem or copy.broken or copy.checks.get('verdict') == 'DAMAGED')


def is_ours(copy: Copy) -> bool:
    return copy.uuid == US_UUID and copy.method is Method.VM and not copy.aside


def held_by_rules(left: Sequence[Copy], chosen: Sequence[Rules]) -> Dict[str, Set[str]]:
    """The rules that hold each of these copies, of which all count; the newest comes first."""
    held = {copy.name: set() for copy in left}  # type: Dict[str, Set[str]]
    for one in chosen:
        of = '' if one.config == chosen[0].config else ' of ' + one.config
        number = one.newest if one.newest > 1 else 1
        for position, copy in enumerate(left):
            if position < number:
                held[copy.name].add('newest %d%s' % (number, of))
        for unit, (period_of, word) in UNITS.items():
            wanted = getattr(one, unit)
            if not wanted:
                continue
            members = {}  # type: Dict[int, List[Copy]]
            for copy in left:
                members.setdefault(period_of(copy), []).append(copy)
            for period in sorted(members)[-wanted:]:
                fulls = [copy for copy in members[period] if is_full(copy) and unit != 'daily']
                held[(fulls or members[period])[0].name].add(word(period) + of)
    return held


def staying(copies: Sequence[Copy], chosen: Sequence[Rules], sealed: str, has_unfinished: bool = False) -> Told:
    """What goes of a directory with chains, and what the rules hold."""
    ordered = newest_first(copies)
    by_name = {copy.name: copy for copy in ordered}
    sound = [copy for copy in ordered if is_ours(copy) and is_sound(copy)]
    left = [copy for copy in sound if not copy.pin]
    held = held_by_rules(left, chosen)
    stays = {copy.name for copy in ordered if copy.name not in held or held[copy.name]} | {sealed}
    stays.update([copy.name for copy in left if not copy.is_old][:1])
    has_chains = any(copy.layer for copy in ordered)
    if any(copy.is_newer or copy.is_unreadable or has_chains and not copy.is_old and copy.method is None for copy in ordered):
        return Told(set(), held)
    if has_unfinished:
        stays.update(copy.name for copy in left if copy.layer)
    stays.update(copy.name for copy in last_of_chain_before(sound, by_name))

    def holds(copy: Copy) -> bool:
        """Does it hold its holders?"""
        if not copy.layer or is_sound(copy) or copy.pin or not is_ours(copy):
            return bool(copy.layer)
        healed = copy._replace(problem='', broken='', checks={})
        healthy = [healed if one is copy else one for one in ordered if one is copy or one.name in held]
        return bool(held_by_rules(newest_first(healthy), chosen)[copy.name])

    asked = [copy for copy in ordered if copy.name in stays and holds(copy)]
    while asked:                           # whoever stays names those that stay with it, and so do these
        copy = asked.pop()
        for name, _ in copy.layer.holders:
            if name in by_name and name not in stays:
                stays.add(name)
                asked.append(by_name[name])
    return Told(set(held) - stays, held)


def last_of_chain_before(sound: Sequence[Copy], by_name: Dict[str, Copy]) -> List[Copy]:
    """The last good copy of the chain before the present one, while the present one's full was not read back."""
    if not sound or not sound[0].layer:
        return []
    full = by_name.get(sound[0].layer.full)
    if full and is_sound(full) and (full.read_back or full.checks.get('verdict') == 'good' or full.checks.get('drilled_at')):
        return []
    return [copy for copy in sound if not copy.layer or copy.layer.full != sound[0].layer.full][:1]
