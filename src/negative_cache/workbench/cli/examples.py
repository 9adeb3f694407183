"""The examples at the end of each command's help."""

EXAMPLES = {
    "doctor": (
        "negative-cache doctor",
        "negative-cache doctor --dim 384 --cache-size 65536 --embedding-dtype int8",
    ),
    "data": (
        "negative-cache data my-pairs.csv",
        "negative-cache data my-pairs.csv --query-column question --positive-column answer",
    ),
    "train": (
        "negative-cache train --data python-code --model static:all-MiniLM-L6-v2 --epochs 1 --eval-documents 3000 "
        "--output first-model",
        "negative-cache train --data my-pairs.csv --model static:all-MiniLM-L6-v2 --output my-model",
        "negative-cache train --data my-pairs.csv --model all-MiniLM-L6-v2 --output other-model",
    ),
    "evaluate": (
        "negative-cache evaluate --model my-model --data my-pairs.csv",
        "negative-cache evaluate --model my-model --data my-pairs.csv --run-out my-model.run",
        "negative-cache evaluate --run my-model.run --data my-pairs.csv",
    ),
    "search": (
        'negative-cache search "how do I open it" --model my-model --data my-pairs.csv',
        'negative-cache search "how do I open it" --model my-model --corpus notes.txt',
    ),
    "report": (
        "negative-cache report my-model",
        "negative-cache report my-model other-model --output report.html",
    ),
    "compare": (
        "negative-cache compare --data my-pairs.csv --output comparison",
        "negative-cache compare --data my-pairs.csv --losses in-batch,negative-cache --seeds 1 --output quick",
    ),
    "significance": (
        "negative-cache significance my-model",
        "negative-cache significance my-model other-model",
        "negative-cache significance comparison --baseline in-batch",
    ),
}
