"""``python -m fedsa_secure`` is ``fedsa-secure``."""

from fedsa_secure.cli import main

main()
