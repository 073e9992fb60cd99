"""The conformance set: `cases` draws it, `explain` says in words what a result of it shows."""
