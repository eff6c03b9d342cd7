"""A process that appends records until it is killed: ``python -m tests.runs.appender RUN_DIR COUNT RESUME``."""

import sys

from subspec.records.run_folder import RunFolder
from tests.helpers.records import CONFIG, record


def main() -> None:
    run_dir, count, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
    with RunFolder.open(run_dir, resume=resume, config=CONFIG) as folder:
        print("open", flush=True)
        for index in range(count):
            if folder.finished(f"s{index}", 0) is None:
                folder.append(record(index, text="x" * 3000))
                print(index, flush=True)
        print("end", flush=True)


if __name__ == "__main__":
    main()
