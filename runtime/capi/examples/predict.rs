// One image, one reading, from Rust without bindgen:  predict BUNDLE [ENGINE_FOLDER]
//     rustc -O predict.rs -L DIR/lib
use std::ffi::{c_char, c_void, CStr, CString};
use std::{env, process, ptr};

#[repr(C)]
struct Frame {
    struct_size: u32, format: i32,
    pixels: *const u8,
    row_stride: i64,
    rows: i32, columns: i32,
    roi_row: i32, roi_column: i32, roi_rows: i32, roi_columns: i32,
    limited_range: i32, phantom: i32,
    spacing_row_mm: f64, spacing_column_mm: f64,
    seq: i64, t_source_ns: i64, t_recv_ns: i64,
}

// The beginning of tusfm_options and of tusfm_reading: a struct says how large it is, so a part of it will do.
#[repr(C)]
struct Options {
    struct_size: u32, abi: u32,
    target: *const c_char, precision: *const c_char, engine_folder: *const c_char,
}

#[repr(C)]
struct Reading {
    struct_size: u32, valid: i32, verified: i32, degraded: i32,
    seq: i64, t_recv_ns: i64,
    age_ms: f64, preprocess_ms: f64, infer_ms: f64, postprocess_ms: f64, total_ms: f64,
    mask: *const u8,
    mask_rows: i32, mask_columns: i32,
    scores: *const f32,
    score_count: i32, exit_index: i32,
    crop: [i32; 4], r#box: [i32; 4],
    frame_rows: i32, frame_columns: i32,
    spacing_row_mm: f64, spacing_column_mm: f64,
    measured: i32, found: i32,
    hc_mm: f64,
}

#[link(name = "tinyusfm")]
extern "C" {
    fn tusfm_options_init(options: *mut Options, size: usize);
    fn tusfm_frame_init(frame: *mut Frame, size: usize);
    fn tusfm_reading_init(reading: *mut Reading, size: usize);
    fn tusfm_open(folder: *const c_char, options: *const Options, session: *mut *mut c_void) -> *mut c_void;
    fn tusfm_predict(session: *mut c_void, frame: *const Frame, reading: *mut Reading) -> *mut c_void;
    fn tusfm_status_text(status: *const c_void) -> *const c_char;
    fn tusfm_close(session: *mut c_void);
}

fn check(status: *mut c_void) {
    if !status.is_null() {
        eprintln!("{}", unsafe { CStr::from_ptr(tusfm_status_text(status)) }.to_string_lossy());
        process::exit(1);
    }
}

fn main() {
    let words: Vec<CString> = env::args().skip(1).map(|word| CString::new(word).unwrap()).collect();
    let inside = |i: i32| (i / 300 - 100).pow(2) + (i % 300 - 150).pow(2) < 4900;
    let pixels: Vec<u8> = (0..200 * 300).map(|i| if inside(i) { 200 } else { 20 }).collect();
    unsafe {
        let (mut options, mut frame, mut reading): (Options, Frame, Reading) = std::mem::zeroed();
        tusfm_options_init(&mut options, size_of::<Options>());
        tusfm_frame_init(&mut frame, size_of::<Frame>());
        tusfm_reading_init(&mut reading, size_of::<Reading>());
        options.engine_folder = words.get(1).map_or(ptr::null(), |folder| folder.as_ptr());
        (frame.pixels, frame.rows, frame.columns) = (pixels.as_ptr(), 200, 300);
        (frame.spacing_row_mm, frame.spacing_column_mm) = (0.2, 0.2);
        let mut session = ptr::null_mut();
        check(tusfm_open(words[0].as_ptr(), &options, &mut session));
        check(tusfm_predict(session, &frame, &mut reading));
        println!("found {}, HC {:.1} mm", reading.found, reading.hc_mm);
        tusfm_close(session);
    }
}
