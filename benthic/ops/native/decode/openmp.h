// What PyTorch's threads do while a step runs. After an operation that was shared out they spin for some ten
// milliseconds, in case another comes: dozens of steps of a small model, on the cores that those need.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

namespace benthic {

// Whether this process was forked off: the threads that OpenMP knows of are then its parent's.
inline bool forked_off = false;
static const int kWatch = pthread_atfork(nullptr, nullptr, [] { forked_off = true; });

// Ends the threads that OpenMP keeps for whoever calls, and makes anew when they are wanted: 40 microseconds, or none if
// there are no threads. Nothing happens where PyTorch's OpenMP is older than 5.0.
inline void end_openmp_threads() {
    static const auto pause = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
    constexpr int kSoft = 1;  // omp_pause_soft
    if (pause != nullptr && !forked_off) pause(kSoft);
}

}  // namespace benthic
