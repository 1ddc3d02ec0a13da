"""Teaching: everything that the chapters, the page "Explore" and the labs show, beyond the model itself.

`plotting` draws figures, plays sound and prints source; `explorables` and, with audio, `listening` are the interactive
figures; `exercises` checks a reader's answers; `demos` computes the numbers behind a slider, and `labs` trains and
changes models for the labs; `notebook_parameters` checks the parameters that papermill injects. Nothing else in the
package imports from here but `cli`. Needs the extra `book` (matplotlib, IPython). Begin with `plotting`, which every
chapter uses.
"""
