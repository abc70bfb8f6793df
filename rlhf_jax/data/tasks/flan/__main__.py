"""Print the table of FLAN's data sets."""

from rlhf_jax.data.tasks.flan import table

if __name__ == "__main__":
    print(table(), end="")
