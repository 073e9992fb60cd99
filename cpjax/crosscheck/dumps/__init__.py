"""Tensors that any tool has dumped (docs/dumps.md): `readers` reads files, `judge_dump` asks and answers."""
