"""What survives what: faults injected into training, snapshots and processes, counted.

    python benchmarks/faults.py snapshots            # 50 kills, every file damaged, cost at 100 MB: 3 minutes
    python benchmarks/faults.py snapshots --kills 5 --cost-seconds 0

Ends with status 1 if anything was lost, or restored wrong without being noticed.
"""

import argparse
import sys

import _snapshot_faults


def snapshots(arguments):
    """Prints the snapshot tables; returns whether all is well."""
    is_well = True
    if arguments.kills:
        counts = _snapshot_faults.kill_trials(arguments.kills, seed=arguments.seed)
        print("| kill -9 at a random moment | count |\n|---|---|")
        print(f"| trials | {counts.trials} |")
        print(f"| of them while a snapshot was being written | {counts.saves_killed} |")
        print(f"| acknowledged snapshots lost | {counts.committed_lost} |")
        print(f"| restored wrong | {counts.wrong} |")
        print(f"| warnings or litter at the next opening | {counts.warned} |\n")
        is_well &= counts.committed_lost == counts.wrong == counts.warned == 0
    if arguments.flips:
        print(
            "| every file of a snapshot | cases | the one before restored, bad one named | anything else |\n"
            "|---|---|---|---|"
        )
        for how, counts in _snapshot_faults.corruption_matrix(seeds=arguments.flips).items():
            print(f"| {how} | {counts['files']} | {counts['previous']} | {counts['wrong']} |")
            is_well &= counts["wrong"] == 0
        print()
    if arguments.cost_seconds:
        cost = _snapshot_faults.cost(run_s=arguments.cost_seconds, size_mb=arguments.size_mb)
        print(f"| {arguments.size_mb:g} MB of state, default cadence | |\n|---|---|")
        print(f"| run; steps; time of a step | {cost.run_s:.0f} s; {cost.steps}; {cost.step_ms:.1f} ms |")
        print(f"| saves | {cost.saves} |")
        print(f"| a save blocks (first; median) | {cost.blocked_first_ms:.0f} ms; {cost.blocked_ms:.0f} ms |")
        print(f"| share of the run blocked | {100 * cost.blocked_share:.3f} % |")
        print(f"| durable after | {cost.write_s:.2f} s |")
        print(f"| a step while a snapshot is written | {cost.step_while_writing_ms:.1f} ms |")
        print(f"| restore, verified | {cost.restore_s:.2f} s |\n")
        is_well &= cost.blocked_share <= 0.01
    return is_well


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("snapshots", help="kills, damaged files, cost")
    part.add_argument("--kills", type=int, default=50, help="how many processes to kill")
    part.add_argument("--flips", type=int, default=5, help="bit flips per file; 0 leaves the damage part out")
    part.add_argument("--cost-seconds", type=float, default=100.0, help="length of the timed run; 0 leaves it out")
    part.add_argument("--size-mb", type=float, default=100.0, help="size of its state")
    part.add_argument("--seed", type=int, default=0)
    part.set_defaults(run=snapshots)
    arguments = parser.parse_args()
    sys.exit(0 if arguments.run(arguments) else 1)


if __name__ == "__main__":
    main()
