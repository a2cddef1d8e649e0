"""The table of export formats in docs/EXPORT.md. Imports no torch."""

from q3q.export.formats import FORMATS, Format, activations, listed


def table() -> str:
    """Return the table of docs/EXPORT.md."""
    lines = [
        "| `export=` | what is stored | codes | symmetry | activations | act-order | mixed "
        "| experts | loaders |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for form in FORMATS.values():
        cells = (
            f"`{form.name}`",
            form.content,
            _codes_cell(form),
            form.symmetry,
            _activation_cell(form),
            "yes" if form.act_order or form.anything else "no",
            "yes"
            if form.anything or form.own_server
            else "dense models, symmetric"
            if form.mixed
            else "`skip` of whole linears"
            if form.gaps
            else "no",
            "yes, all experts' in one tensor"
            if form.own_server
            else "yes, one set of tensors per expert",
            "; ".join(f"{name} ({status}): {scope}" for name, status, scope in form.loaders),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _codes_cell(form: Format) -> str:
    if form.anything:
        return "all, and BiLLM's"
    if form.own_server:
        return "GGUF's types"
    floats = "".join(f", `{name}`" for name in form.floats)
    return f"int of {listed(form.bits)} bits{floats}"


def _activation_cell(form: Format) -> str:
    cells = [f"W{w}A{a}, one scale per row" for w, a in form.acts]
    for name, acts in form.floats.items():
        if acts:
            cells.append(f"`{name}` with {' or '.join(activations(*act) for act in acts)}")
    return "; ".join(cells) or "no"
