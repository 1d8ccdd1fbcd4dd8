"""What mkdocstrings shows of the package: the comments behind parameters and fields, as tables."""

from typing import Any

from fastcore.docments import docments
from griffe import (
    Attribute,
    Class,
    Docstring,
    DocstringAttribute,
    DocstringParameter,
    DocstringReturn,
    DocstringSectionAttributes,
    DocstringSectionExamples,
    DocstringSectionKind,
    DocstringSectionParameters,
    DocstringSectionReturns,
    DocstringSectionText,
    Extension,
    Function,
    dynamic_import,
)


def comments(path: str) -> dict[str, str]:  # by parameter or field; "return" among them
    "The comments behind the parameters of a function or the fields of a class."
    thing = dynamic_import(path)
    thing = getattr(thing, "fget", thing)  # of a property
    return {name: facts["docment"] or "" for name, facts in docments(thing, full=True).items()}


def document(thing: Class | Function | Attribute, *sections: Any) -> None:
    "Give `thing` its docstring and the sections that have something in them."
    thing.docstring = thing.docstring or Docstring("", parent=thing)
    said, prompt, example = thing.docstring.value.partition(">>> ")
    text = [DocstringSectionText(said)] if said else []
    examples = [DocstringSectionExamples([(DocstringSectionKind.examples, prompt + example)])] if example else []
    thing.docstring.parsed = [*text, *(section for section in sections if section.value), *examples]


class Docments(Extension):
    "Comments become sections of the docstring."

    def on_function(self, *, func: Function, **_: Any) -> None:
        if func.is_special:  # most are made by dataclass
            func.public = bool(func.docstring)
        if not func.is_public or func.parent.is_function:  # one inside __init__ cannot be imported
            return
        said = comments(func.path)
        parameters = [
            DocstringParameter(p.name, annotation=p.annotation, description=said.get(p.name, ""), value=p.default)
            for p in func.parameters
            if p.name not in ("self", "cls")
        ]
        returned = said.get("return") or str(func.returns or "None") != "None"
        returns = [DocstringReturn("", annotation=func.returns, description=said.get("return", ""))] if returned else []
        document(func, DocstringSectionParameters(parameters), DocstringSectionReturns(returns))

    def on_class(self, *, cls: Class, **_: Any) -> None:
        if not cls.is_public:
            return
        said = comments(cls.path)
        fields = [m for m in cls.members.values() if m.is_attribute and m.annotation and "property" not in m.labels]
        for field in fields:
            del cls.members[field.name]  # once, in the table
        document(cls, DocstringSectionAttributes([
            DocstringAttribute(f.name, annotation=f.annotation, description=said.get(f.name, ""), value=f.value)
            for f in fields
        ]))  # fmt: skip
