"""Show the learned words in a file, and convert them:  python -m tinyti.convert IN [OUT]"""

import os
import sys

from .concept import Concept
from .files.words import compatibility_warning, name_width, read_words, write_words
from .model import load
from .programs import cli


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 for bad input."""
    parser = cli.Parser("Show or convert learned words.")
    parser.prog = "python -m tinyti.convert"
    parser.add_argument("IN", help="a learned word: a file, or the folder that train.py wrote")
    parser.add_argument("OUT", nargs="?", help="write this .safetensors (diffusers) or .pt (AUTOMATIC1111)")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--weights", metavar="PATH", help="diffusion model, to show the nearest words, too")
    return cli.run_program("tinyti.convert", lambda: convert(parser.parse_args(arguments)))


def convert(args) -> int:
    """Show the words of IN, and write them to OUT."""
    if args.OUT and os.path.lexists(args.OUT) and not args.force:
        raise ValueError(f"{args.OUT} exists; give another name, or --force to overwrite it")
    model = load(args.weights) if args.weights else None
    notes = []
    words = read_words(args.IN, model.text.table.shape[1] if model else None, notes.append)
    if args.OUT:
        write_words(args.OUT, words)
        notes += filter(None, (compatibility_warning(name, len(v)) for name, v in words.items()))
    for name, vectors in words.items():
        norms = " ".join(f"{norm:.3f}" for norm in vectors.norm(dim=1).tolist())
        print(f"{name}: {len(vectors)} x {name_width(vectors.shape[1])}, norm {norms}")
        if model:
            concept, token = Concept(name, vectors, [*range(len(vectors))]), model.tokenizer.token
            for row in concept.nearest(model.text.table, among=model.tokenizer.word_ids()):
                print("  near " + ", ".join(f"{token(id)} {cosine:.2f}" for id, cosine in row))
    if args.OUT:
        print(f"written to {args.OUT}")
    for note in notes:
        print(f"WARNING: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.leave(main)
