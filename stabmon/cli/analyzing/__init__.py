"""Parts of ``stabmon analyze``: options, inputs, analyses, files, output."""
