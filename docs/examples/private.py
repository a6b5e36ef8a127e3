"""Private fine-tuning in two minutes: what it promises, and what the controls say.

    python docs/examples/private.py [--small]

The ledgers of this example go into its own folder, so that it counts against no budget of yours.
"""

import sys
import tempfile
from pathlib import Path

import fedsa_secure

SMALL = {"clients": 3, "max_rows": 600, "rounds": 2, "personal_steps": 5}


def main(options: dict[str, int]) -> None:
    """Train with and without sharing, and print both beside the promise."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        private = fedsa_secure.train(
            dp_epsilon=8,
            dp_dataset_id="example",
            dp_lifetime_epsilon=10,
            dp_home=str(home / "silo"),
            output_dir=str(home / "private"),
            **options,
        )
        print(private.privacy.statement)
        print(f"sigma {private.privacy.noise_multiplier:g}, {private.privacy.steps} noised steps")
        plain = {name: value for name, value in options.items() if name != "personal_steps"}
        alone = fedsa_secure.train(method="local", output_dir=str(home / "local"), **plain)
        print(f"private A: {private.accuracy:.1%}; every client alone: {alone.accuracy:.1%}")
        again = {**options, "dp_epsilon": 8, "dp_dataset_id": "example", "dp_lifetime_epsilon": 10}
        try:
            fedsa_secure.train(**again, dp_home=str(home / "silo"), output_dir=str(home / "again"))
        except fedsa_secure.BudgetExceededError as error:
            print(f"a second run on the same data: {error}")


if __name__ == "__main__":
    main(SMALL if "--small" in sys.argv else {})
