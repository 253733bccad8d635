"""How ranks find and reach each other: what the starter says, addresses, the shared secret, process groups."""
