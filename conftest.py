"""Settings for all tests, those in docstrings and Markdown files too.

There are eight CPU devices, for what is sharded. The examples in Markdown files may end
at the fence of their code block: doctest takes it for a line of the expected output.
"""

import doctest
import re

import jax

jax.config.update("jax_num_cpu_devices", 8)

FENCE = re.compile(r"^ *```.*$", re.MULTILINE)


class MarkdownParser(doctest.DocTestParser):
    def parse(self, string: str, name: str = "<string>"):
        return super().parse(FENCE.sub("", string), name)


# pytest's collector of text files looks this name up when it reads one; docstrings are
# parsed by the class that it named before.
doctest.DocTestParser = MarkdownParser
