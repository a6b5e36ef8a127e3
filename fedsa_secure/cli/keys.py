"""``fedsa-secure keys``."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Long-term identities of clients.")


@app.command("new")
def _new_identity(
    path: Annotated[Path, typer.Argument(help="where the private key goes; mode 0600")],
) -> None:
    """Make the long-term identity of a client, and print its public key."""
    from fedsa_secure.secagg import Identity

    identity = Identity.new()
    identity.save(path)
    typer.echo(identity.public_key.hex())


@app.command("show")
def _show_identity(
    path: Annotated[Path, typer.Argument(help="file of a private key")],
) -> None:
    """Print the public key of an identity, for the other clients' rosters."""
    from fedsa_secure.secagg import Identity

    typer.echo(Identity.load(path).public_key.hex())


@app.command("register")
def _register_identity(
    roster: Annotated[Path, typer.Argument(help="the roster, made if it does not exist")],
    client: Annotated[int, typer.Argument(min=0, help="number of the client")],
    public_key: Annotated[str, typer.Argument(help="as 'keys show' prints it")],
) -> None:
    """Put a client on a roster. Every client keeps a roster of its own and sends it to nobody."""
    from fedsa_secure.secagg import register

    for number, key in sorted(register(roster, client, public_key).items()):
        typer.echo(f"{number}  {key.hex()}")
