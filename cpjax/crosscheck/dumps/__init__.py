"""Tensors that any tool has dumped (docs/dumps.md): `readers` reads files, `judge_dump` asks and answers."""

from cpjax.crosscheck.dumps.readers import read_array as read_array
