"""Pages as a strict reader sees them, for the tests of what truestep writes as HTML."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\"'&\x1b[31m\u202e</pre>"


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.text, self.pre, self.mark = "", [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in {"pre", "mark"}:
            getattr(self, tag).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"
        for tag in {"pre", "mark"} & set(self.open):
            getattr(self, tag)[-1] += data


def assert_inert(text):
    """The page needs nothing else, runs nothing, and leads nowhere but to places in itself."""
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object", "embed", "img"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    places = [value for name, value in page.attributes if name == "id"]
    assert len(set(places)) == len(places)
    targets = {value for name, value in page.attributes if name == "href"}
    assert targets <= {f"#{place}" for place in places}
