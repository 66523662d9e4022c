"""Lets the examples in Markdown files end at the fence of their code block.

doctest by itself takes the closing fence for a line of the expected output.
"""

import doctest
import re

FENCE = re.compile(r"^ *```.*$", re.MULTILINE)


class MarkdownParser(doctest.DocTestParser):
    def parse(self, string: str, name: str = "<string>"):
        return super().parse(FENCE.sub("", string), name)


# pytest's collector of text files looks this name up when it reads one; docstrings are
# parsed by the class that it named before.
doctest.DocTestParser = MarkdownParser
