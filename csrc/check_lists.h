// Input checks of the list steps. All tensors of a step are on the device of its first parameter.
#pragma once

#include <initializer_list>

#include "check.h"
#include "step_calls.h"

namespace spectral_kernels {

// Params and gradients of one list step: shapes, dtypes, devices, aliases.
void check_step(const StepLists& lists);
// A list of state tensors that is written: entry i has the shape and batch of param i, or size 0 if
// `optional`.
void check_state(TensorList state, const char* name, TensorList params, bool optional);
// A moment: as check_state, or bfloat16 beside params that are not float64.
void check_moment(TensorList state, const char* name, TensorList params);
// As check_state, for one number a row, (..., m, 1), of every entry if `present`, else of none.
void check_rows_state(TensorList state, const char* name, TensorList params, bool present);
// As check_state, for square factors over rows (`side` 0) or columns (1) of the params.
void check_factors(TensorList factors, const char* name, TensorList params, int side);
// Partners of factors, their roots or bases, are there where they are.
void check_partners(TensorList factors, const char* name, TensorList partners, const char* partner);
// Factors, bases on the same sides, and one flag an entry.
void check_eigenbasis_lists(const BasisLists& lists);
// No tensor that is written overlaps another, or one that is read.
void check_distinct(std::initializer_list<TensorList> written, TensorList read);
// The same of the lists of a step in eigenbases, exp_avg_sqs among them if `squares`.
void check_eigenbasis_distinct(const BasisLists& lists, bool squares);
// Flat restarts of a list: those of entry i end at ends[i]; no ends, no restarts.
void check_restart_ends(IntArrayRef restarts, IntArrayRef ends, size_t entries);

}  // namespace spectral_kernels
