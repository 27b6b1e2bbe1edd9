"""`loractl merge` and `loractl convert`: adapters into other shapes of the same change. Click only."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loractl.cli.context import adapter_folder, hub_option
from loractl.cli.output import print_note

if TYPE_CHECKING:
    from loractl.adapters.merging import Merged

_OUT = click.Path(path_type=Path)


@click.command(short_help="Merge an adapter into its base, or several adapters into one.")
@click.argument("adapters", nargs=-1, required=True, metavar="REF|DIR...")
@click.option("--base", required=True, help="The base they belong to: a folder, or a hub repo id.")
@click.option("--out", type=_OUT, required=True, help="New folder for the result.")
@click.option("--into-base", is_flag=True, help="Make a whole model of the base and one adapter.")
@click.option(
    "--method",
    type=click.Choice(["sum", "linear", "svd", "ties", "dare_linear", "dare_ties"]),
    default="sum",
    show_default=True,
    help="How several become one; sum is exact, at the rank of all together.",
)
@click.option("--weights", metavar="W,W", help="How much of each; 1 of each unless given.")
@click.option(
    "--density", type=click.FloatRange(0.01, 1.0), default=0.5, show_default=True, help="What TIES, DARE keep."
)
@click.option("--seed", type=int, default=0, show_default=True, help="What DARE draws by.")
@hub_option
def merge(*, adapters: tuple[str, ...], base: str, out: Path, into_base: bool, hub_url: str | None, **how: Any) -> None:
    """Merge an adapter into its base, or several adapters into one.

    A server of this product needs neither: it sums adapters per request, over one base in 8 bits.

    \b
    Examples:
      loractl merge team/reviews@prod --base BASE --into-base --out models/reviews
      loractl merge runs/a runs/b --base BASE --weights 0.7,0.3 --out runs/both
      loractl merge runs/a runs/b --base BASE --method ties --density 0.3 --out runs/both
    """
    from loractl.adapters.base_source import resolve_base
    from loractl.adapters.errors import UsageError
    from loractl.adapters.merging import merge_into_base, merge_together

    if into_base and len(adapters) > 1:
        raise UsageError("--into-base takes one adapter", hint="merge the adapters first, then the result")
    weights = _weights(how.pop("weights"))
    folders = [adapter_folder(name, hub_url) for name in adapters]
    source = resolve_base(base)
    if into_base:
        _tell_whole(merge_into_base(folders[0], source, out))
        return
    merged = merge_together(folders, source, out, weights=weights, **how)
    click.echo(str(merged.folder))
    print_note(f"next: loractl eval {merged.folder} --base {base} --data FILE")


@click.command(short_help="Move an adapter between W_pack and q_proj, k_proj, v_proj.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--layout", type=click.Choice(["w_pack", "split"]), required=True, help="The layout to write.")
@click.option("--out", type=_OUT, required=True, help="New folder for the result.")
def convert(*, folder: Path, layout: Any, out: Path) -> None:
    """Move an adapter between W_pack and q_proj, k_proj, v_proj.

    Baichuan-7B's own files fuse three layers into W_pack; here its base is split as it loads. Both forms of an
    adapter make the same change.

    \b
    Examples:
      loractl convert runs/reviews --layout w_pack --out runs/reviews-packed
    """
    from loractl.adapters.conversion import convert_adapter

    click.echo(str(convert_adapter(folder, layout, out)))


def _tell_whole(merged: "Merged") -> None:
    click.echo(str(merged.folder))
    if merged.drift is None:
        print_note("the adapter's record has no probes, so nothing was compared")
    else:
        print_note(f"probes: log probabilities differ by at most {merged.drift:.4f} from those at the end of training")
    print_note("quantizing this model again gives other numbers than base and adapter apart: evaluate it first")


def _weights(text: str | None) -> list[float] | None:
    from loractl.adapters.errors import UsageError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r} are not numbers", hint="for example --weights 0.7,0.3") from None
