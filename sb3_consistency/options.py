"""
An argument, declared once: name, type, default, limits and meaning.

A class declares its arguments as fields; subclasses inherit them, and a plain value in a subclass is a new default. From the
declarations follow the constructor's signature, the checks and their messages, what may change on a running model, what a
safe file may hold, the search space of tuning, and the options page of the documentation.
"""

import inspect
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Union, dataclass_transform, get_args, get_origin

# a constant, or a function of the number of gradient steps taken so far
StepSchedule = float | Callable[[int], float]
# what is checked, and raises if it does not fit: (name, value)
Check = Callable[[str, Any], None]


class _Missing:
    """The default of an argument that must be given."""

    def __repr__(self) -> str:
        return "(required)"

    def __reduce__(self) -> str:
        return "MISSING"  # the one there is: classes of a user's main program are pickled with a model


MISSING = _Missing()
#: stands for an attribute that is declared among the options, and is none
ATTRIBUTE = object()


class Option:
    """
    The declaration of one argument, see :func:`option`.

    :ivar name: name of the constructor's argument
    :ivar attribute: name of the attribute that holds its value
    :ivar annotation: its type, as text
    :ivar owner: class that declares it
    """

    def __init__(self, **declared: Any) -> None:
        self.default: Any = declared["default"]
        self.doc: str = declared["doc"]
        self.low: float = declared["low"]
        self.high: float = declared["high"]
        self.above: float | None = declared["above"]
        self.one_of: tuple[str, ...] | None = declared["one_of"]
        self.own_check: Check | None = declared["check"]
        self.search: Any = declared["search"]
        self.fixed: bool = declared["fixed"]
        self.sb3: bool = declared["sb3"]
        self.stored: bool = declared["stored"]
        self.size: bool = declared["size"]
        self.before: Any = declared["before"]
        self.kw_only: bool = declared["kw_only"]
        self.alias: str | None = declared["alias"]
        self.attribute_override: str | None = declared["attribute"]
        self.name = self.attribute = self.annotation = ""
        self.owner: type[Any] = object
        self.field = ""

    def bound(self, owner: type[Any], field: str, annotation: Any) -> "Option":
        """
        :param owner: class that declares the field; one that declares it again does not become its owner
        :param field: its name there
        :param annotation: its type
        :return: this declaration
        """
        if self.owner is object:
            self.owner = owner
        self.field, self.name = field, self.alias or field
        self.attribute = self.attribute_override or self.name
        self.hint: Any = annotation
        self.annotation = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        return self

    def changed(self, **changes: Any) -> "Option":
        """
        :param changes: other values of its attributes, another default say
        :return: the declaration with them; all else stays
        """
        copy = Option.__new__(Option)
        vars(copy).update(vars(self), **changes)
        return copy

    @property
    def members(self) -> tuple[Any, ...]:
        """The types that it may have."""
        hint = self.hint
        if isinstance(hint, str):  # as modules that postpone the evaluation of annotations have it
            hint = eval(hint, vars(sys.modules[self.owner.__module__]))
        return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)

    def check(self, value: Any) -> None:
        """
        :param value: a value for it
        :raises ValueError: if it is outside of the limits, or none of the choices
        :raises TypeError: if it is of the wrong type
        """
        members = self.members
        if value is None and type(None) in members:
            return
        if self.own_check is not None:
            self.own_check(self.name, value)
        elif self.one_of is not None:
            check_choice(self.name, value, self.one_of)
        elif bool in members:
            check_flags(optional=type(None) in members, **{self.name: value})
        else:
            self._check_kind(value, members)

    def _check_kind(self, value: Any, members: tuple[Any, ...]) -> None:
        kinds = {get_origin(member) or member: member for member in members}
        optional, schedule = type(None) in members, Callable in kinds or any(_is_protocol(m) for m in members)
        if tuple in kinds and not {int, float} & kinds.keys():
            check_pair(self.name, value, self.low, integer=get_args(kinds[tuple])[0] is int)
        elif {int, float} & kinds.keys():
            check_range(
                self.name,
                value,
                self.low if self.above is None else self.above,
                self.high,
                open_low=self.above is not None,
                integer=float not in kinds,
                optional=optional,
                schedule=schedule,
            )
        elif dict in kinds and list not in kinds:
            check_type(self.name, value, dict, "a dict")


def option(
    *,
    default: Any = MISSING,
    doc: str = "",
    low: float = -float("inf"),
    high: float = float("inf"),
    above: float | None = None,
    one_of: Sequence[str] | None = None,
    check: Check | None = None,
    search: Any = None,
    fixed: bool = False,
    sb3: bool = False,
    stored: bool = True,
    size: bool = True,
    before: Any = MISSING,
    init: bool = True,
    kw_only: bool = True,
    alias: str | None = None,
    attribute: str | None = None,
) -> Any:
    """
    Declare an argument.

    :param default: its default; none for one that must be given
    :param doc: what it means, for documentation
    :param low: lowest value allowed
    :param high: highest value allowed
    :param above: a value that it must be above, in place of ``low``
    :param one_of: the values allowed
    :param check: checks a value, in place of all of these
    :param search: what tuning samples it from: a pair of limits, with "log" as a third entry, or a list of choices; or a dict
        of these, by "offline" and "online"
    :param fixed: whether it is fixed once a model is built
    :param sb3: whether SB3 stores and checks it
    :param stored: whether a safe file holds it
    :param size: whether it is a size, which a safe file must not make arbitrarily large
    :param before: its value in models saved before it existed; none for one that always did
    :param init: whether the constructor takes it; if not, it is only an attribute with a type
    :param kw_only: whether it is passed by keyword only
    :param alias: name of the constructor's argument, where the attribute means something else
    :param attribute: name of the attribute that holds the value, where SB3 has its own
    :return: the declaration
    """
    declared = dict(locals())
    return Option(**{**declared, "one_of": None if one_of is None else tuple(one_of)}) if init else ATTRIBUTE


def redeclared(cls: type[Any], name: str, *, default: Any, **changes: Any) -> Any:
    """
    Declare an inherited argument with other choices, limits or meaning. It stays the one that others share.

    :param cls: class that has it
    :param name: its name
    :param default: its default
    :param changes: what else is different, as :func:`option` calls it
    :return: the declaration
    """
    return options_of(cls)[name].changed(default=default, **changes)


def _is_protocol(member: Any) -> bool:
    return getattr(member, "_is_protocol", False) is True


@dataclass_transform(kw_only_default=True, field_specifiers=(option, redeclared))
class Options:
    """
    A class whose constructor's arguments are its fields, and those of its bases.

    Subclasses supply :meth:`construct`.
    """

    _own_options: ClassVar[dict[str, Option]] = {}
    _all_options: ClassVar[dict[str, Option]] = {}
    _options_by_attribute: ClassVar[dict[str, Option]] = {}
    __signature__: ClassVar[inspect.Signature]
    #: end of the message that refuses to change a fixed option
    fixed_until: ClassVar[str] = "give it to the constructor, or to load(..., {name}=...)"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = [o for base in reversed(cls.__mro__[1:]) for o in vars(base).get("_own_options", {}).values()]
        # by the argument's name, too, where the field has another: a default is written as the argument is
        inherited = {o.name: o for o in bases} | {o.field: o for o in bases}
        own: dict[str, Option] = {}
        annotations = inspect.get_annotations(cls)
        for field, value in list(vars(cls).items()):
            if isinstance(value, Option):
                own[value.bound(cls, field, annotations.get(field, Any)).name] = value
            elif value is ATTRIBUTE:
                pass
            elif field in inherited and not isinstance(value, property):
                own[inherited[field].name] = inherited[field].changed(default=value)
            else:
                continue
            # the class has no such attribute: the value is an instance's
            delattr(cls, field)
        cls._own_options = own
        cls._all_options = {n: o for base in reversed(cls.__mro__) for n, o in vars(base).get("_own_options", {}).items()}
        cls._options_by_attribute = {o.attribute: o for o in cls._all_options.values()}
        cls.__signature__ = _signature(cls)

    if not TYPE_CHECKING:  # type checkers see the signature that follows from the fields

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.construct(bind(type(self), args, kwargs))

    def construct(self, values: dict[str, Any]) -> None:
        """
        Store the options, and make what is made of them.

        :param values: all of them, by name
        """
        self.store(values)

    def store(self, values: Mapping[str, Any]) -> None:
        """
        :param values: options by name, to be stored as attributes without further ado
        """
        declared = options_of(type(self))
        vars(self).update({declared[name].attribute: value for name, value in values.items()})

    def option_values(self) -> dict[str, Any]:
        """
        :return: the options' present values, by name
        """
        declared, stored = options_of(type(self)).values(), vars(self)
        # modules are no plain attributes
        return {o.name: stored.get(o.attribute, getattr(self, o.attribute)) for o in declared if hasattr(self, o.attribute)}

    def check_options(self) -> None:
        """
        :raises ValueError: if an option is out of its range, or two don't go together
        :raises TypeError: if one is of the wrong type
        """
        for declared in options_of(type(self)).values():
            if declared.attribute in vars(self):
                declared.check(vars(self)[declared.attribute])
        self.check_together()

    def check_together(self) -> None:
        """
        Check what no option tells alone; subclasses add theirs.

        :raises ValueError: if two options don't go together
        """

    @property
    def is_built(self) -> bool:
        """Whether what depends on the options is made: from then on changes are checked, and take effect."""
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        declared = self._options_by_attribute.get(name)
        if declared is None or declared.sb3 or not self.is_built:
            super().__setattr__(name, value)
            return
        before = vars(self).get(name)
        if declared.fixed and not _same(before, value):
            raise AttributeError(
                f"{declared.name} can't be changed on a {type(self).__name__} that is built, from {before!r} to {value!r}: "
                f"{self.fixed_until.format(name=declared.name)}."
            )
        vars(self)[name] = value
        try:
            declared.check(value)
            self.check_together()
            self.option_changed(declared.name, value)
        except Exception:
            # where it was handed on to, too
            vars(self)[name] = before
            self.option_changed(declared.name, before)
            raise

    def option_changed(self, name: str, value: Any) -> None:
        """
        Called when an option was changed on an object that is built.

        :param name: its name
        :param value: its new value
        """

    @classmethod
    def explain_unknown(cls, name: str) -> str:
        """
        :param name: an argument that the constructor does not have
        :return: end of a message: what is known
        """
        return did_you_mean(name, options_of(cls)).rstrip(";") or "."


def options_of(cls: type[Any]) -> dict[str, Option]:
    """
    :param cls: a class that declares options
    :return: its own and inherited ones, by the name of the constructor's argument
    """
    return dict(getattr(cls, "_all_options", {}))


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))


def shared_options(one: type[Any], other: type[Any]) -> list[str]:
    """
    :param one: a class that declares options
    :param other: another
    :return: names of the options that both have from one declaration
    """
    theirs = options_of(other)
    return [name for name, o in options_of(one).items() if name in theirs and theirs[name].owner is o.owner]


def _ordered(cls: type[Any]) -> list[Option]:
    """Positional arguments first, those without a default before the others."""
    return sorted(options_of(cls).values(), key=lambda o: (o.kw_only, not o.kw_only and o.default is not MISSING))


def _signature(cls: type[Any]) -> inspect.Signature:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [
        inspect.Parameter(
            o.name,
            kinds[o.kw_only],
            default=inspect.Parameter.empty if o.default is MISSING else o.default,
            annotation=o.hint,
        )
        for o in _ordered(cls)
    ]
    # constructors of a user's own, the basic ones first: their arguments, and those that they hand on
    for base in reversed(cls.__mro__[: cls.__mro__.index(Options)]):
        if "__init__" in vars(base):
            parameters = _handed_on(vars(base)["__init__"], parameters)
    return inspect.Signature(parameters)


def _handed_on(init: Callable[..., Any], parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    """The parameters of a constructor, with those that its ``*args`` and ``**kwargs`` stand for."""
    theirs = list(inspect.signature(init).parameters.values())[1:]
    kinds = {p.kind for p in theirs}
    named = [p for p in theirs if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    rest = [p for p in parameters if p.name not in {p.name for p in named}]
    if any(p.kind < p.KEYWORD_ONLY for p in named) or inspect.Parameter.VAR_POSITIONAL not in kinds:
        rest = [p.replace(kind=p.KEYWORD_ONLY) for p in rest]
    return sorted([*named, *(rest if inspect.Parameter.VAR_KEYWORD in kinds else [])], key=lambda p: p.kind)


def argument_names(cls: type[Any]) -> set[str]:
    """
    :param cls: a class
    :return: names of its constructor's arguments, inherited ones included
    """
    if issubclass(cls, Options):
        return set(cls.__signature__.parameters)
    inits = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    parameters = [p for init in inits for p in list(inspect.signature(init).parameters.values())[1:]]
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def bind(cls: type[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param cls: a class that declares options
    :param args: positional arguments
    :param kwargs: arguments by name
    :return: the values of all options
    :raises TypeError: if one is unknown, missing or given twice
    """
    declared = options_of(cls)
    # not the signature's: a constructor of a user's own has others
    positional = [o.name for o in _ordered(cls) if not o.kw_only]
    if len(args) > len(positional):
        raise TypeError(
            f"{cls.__name__}() takes {len(positional)} positional arguments ({', '.join(positional)}), got {len(args)}: pass "
            "the others by name."
        )
    given = dict(zip(positional, args, strict=False))
    for name, value in kwargs.items():
        if name not in declared:
            raise TypeError(f"{cls.__name__}() got an unexpected argument {name!r}{cls.explain_unknown(name)}")
        if name in given:
            raise TypeError(f"{cls.__name__}() got {name!r} twice.")
        given[name] = value
    values = {name: given.get(name, o.default) for name, o in declared.items()}
    for name, value in values.items():
        if value is MISSING:
            raise TypeError(f"{cls.__name__}() needs {name!r}.")
    return values


# checks, and the wording of their errors


def at_step(schedule: StepSchedule, step: int) -> float:
    """
    :param schedule: constant or function of the gradient step
    :param step: number of gradient steps taken so far
    :return: the value now
    """
    return float(schedule(step)) if callable(schedule) else float(schedule)


def check_range(
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    integer: bool = False,
    optional: bool = False,
    schedule: bool = False,
) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param low: lowest value allowed
    :param high: highest value allowed; infinity itself never is
    :param open_low: whether ``low`` itself is not allowed
    :param integer: whether it must be an integer
    :param optional: whether None (not set) is allowed
    :param schedule: whether a function is allowed, whose values are not checked
    :raises ValueError: if the value is outside, or NaN
    :raises TypeError: if it is no number
    """
    if (optional and value is None) or (schedule and callable(value)):
        return
    kind: Any = Integral if integer else Real
    if not isinstance(value, kind) or isinstance(value, bool):  # True would pass for 1
        allowed = ["an integer" if integer else "a number", *["None"] * optional, *["a function"] * schedule]
        raise TypeError(f"{name} must be {' or '.join(allowed)}, got {value!r}.")
    if not (low < value <= high if open_low else low <= value <= high) or value == float("inf"):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value}.")


def check_flags(*, optional: bool = False, **flags: Any) -> None:
    """
    :param optional: whether None (not set) is allowed
    :param flags: arguments that are True or False, by name
    :raises TypeError: if one is neither
    """
    for name, value in flags.items():
        if optional and value is None:
            continue
        if not (isinstance(value, Integral) or type(value).__name__.startswith("bool")) or value not in (0, 1):
            raise TypeError(f"{name} must be {'True, False or None' if optional else 'True or False'}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param choices: the values allowed
    :raises ValueError: if it is none of them
    """
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}.")


def check_type(name: str, value: Any, kind: type[Any], wanted: str) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value; None is allowed
    :param kind: what it must be
    :param wanted: the same in words
    :raises TypeError: if it is something else
    """
    if not (value is None or isinstance(value, kind)):
        raise TypeError(f"{name} must be {wanted} or None, got {value!r}.")


def check_class(name: str, value: Any, base: type[Any], or_function: bool = True) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param base: what it must be a subclass of
    :param or_function: whether a function that makes an instance will do
    :raises TypeError: if it is something else, an instance for example
    """
    is_function = or_function and callable(value) and not isinstance(value, base)
    makes = issubclass(value, base) if isinstance(value, type) else is_function
    if not makes:
        wanted = f"{base.__module__}.{base.__qualname__}"
        raise TypeError(f"{name} must be a subclass of {wanted} (the class, not its name or an instance), got {value!r}.")


def check_pair(name: str, value: Any, low: float, *, integer: bool = False) -> None:
    """
    :param name: name of the argument, for the message
    :param value: its value
    :param low: lowest value allowed
    :param integer: whether both must be integers
    :raises ValueError: if they are not two, or one is outside
    :raises TypeError: if one is no number
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, got {value!r}.")
    for number in value:
        check_range(name, number, low, integer=integer)


def did_you_mean(name: object, known: Collection[str]) -> str:
    """
    :param name: an unknown name
    :param known: the known ones
    :return: end of a message, with the nearest of them if there is one
    """
    close = get_close_matches(str(name), known, 1)
    return f"; did you mean {close[0]!r}?" if close else ";"


def check_keys(where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """
    :param where: the argument that holds them, for the message
    :param given: arguments by name
    :param known: names allowed
    :raises TypeError: if one is unknown
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{where}: unknown {name!r}{did_you_mean(name, known)} known: {', '.join(sorted(known))}.")
