"""Teaching: code for the chapters, the page "Explore" and the labs, beyond the model itself.

`plotting` draws figures, plays sound and prints source; `picture` makes figures that fit a page. `explorables` and,
with audio, `listening` contain the interactive figures, and `demos` computes their numbers. `exercises` checks a
reader's answers, and `labs` trains and changes models for the labs. `notebook_parameters` checks the parameters that
papermill injects. Within the package, only `cli` imports from here. Needs the extra `book` (matplotlib, IPython). Begin
with `plotting`, which every chapter uses.
"""
