"""The commands of `cpjax`, one file a group; `cpjax.cli` puts them together."""
