"""An HTML page taken apart: what it holds, and whether it stands alone."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What the page holds; unclosed tags are an error."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def says(self, sentence: str) -> bool:
        """Whether the words stand on the page, however they are broken into lines."""
        return " ".join(sentence.split()) in " ".join(" ".join(self.words).split())

    def assert_alone(self) -> None:
        """It is whole, fetches nothing and runs nothing: its only links lead to places in itself."""
        assert self.open == []
        assert not self.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"}
        fetching = ("href", "src", "srcset", "xlink:href", "action", "data", "poster", "background", "ping")
        links = [value for name, value in self.attributes if name in fetching]
        assert all(link is not None and link.startswith("#") for link in links), links
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        assert not [value for name, value in self.attributes if name == "http-equiv"]
        for word in ("url(", "@import", "http:", "https:", "//"):
            assert word not in self.text.lower(), word
