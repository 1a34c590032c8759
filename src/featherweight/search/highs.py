"""Binary programs on HiGHS (Huangfu and Hall, 2018), through its own small package."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def binary_program(
    cost: F64,
    owner: npt.NDArray[np.intp],
    n_sites: int,
    rows: F64,
    limits: F64,
    *,
    time_limit_s: float,
    relative_gap: float,
) -> tuple[F64, float] | None:
    """Minimise cost . x over binary x (n,) with one x a site (`owner` (n,)) and rows (m, n) @ x <= limits (m,).

    Returns x (n,) float64 and the relative gap, or None if it is infeasible or nothing was found in the time. One
    thread and a fixed seed: equal programs give equal answers.
    """
    import highspy

    n, m = len(cost), len(limits)
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    options: dict[str, bool | int | float] = {
        "output_flag": False,
        "log_to_console": False,
        "threads": 1,
        "random_seed": 0,
        "time_limit": time_limit_s,
        "mip_rel_gap": relative_gap,
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n, n_sites + m
    lp.col_cost_ = np.asarray(cost, np.float64)
    lp.col_lower_, lp.col_upper_ = np.zeros(n), np.ones(n)
    lp.row_lower_ = np.concatenate([np.ones(n_sites), np.full(m, -highspy.kHighsInf)])
    lp.row_upper_ = np.concatenate([np.ones(n_sites), np.asarray(limits, np.float64)])
    lp.integrality_ = [highspy.HighsVarType.kInteger] * n
    # Each column holds a one in its site's row, then its entry of each of the m dense rows.
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_ = np.arange(0, (n + 1) * (1 + m), 1 + m, dtype=np.int32)
    dense = [np.full(n, n_sites + i) for i in range(m)]
    lp.a_matrix_.index_ = np.column_stack([owner, *dense]).astype(np.int32).ravel()
    lp.a_matrix_.value_ = np.column_stack([np.ones(n), *rows]).ravel()
    solver.passModel(lp)
    solver.run()
    info = solver.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    gap = float(info.mip_gap)
    return np.array(solver.getSolution().col_value, np.float64), gap if np.isfinite(gap) else 1.0
