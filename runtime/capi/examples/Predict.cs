// One image, one reading, from C#:  Predict BUNDLE IMAGE.pgm ROW_MM COLUMN_MM [ENGINE_FOLDER]
// The structs end after the last field that is used: struct_size tells the library so.
using System;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;

[StructLayout(LayoutKind.Sequential)]
struct Frame
{
    public uint struct_size; public int format; public IntPtr pixels; public long row_stride;
    public int rows, columns, roi_row, roi_column, roi_rows, roi_columns, limited_range, phantom;
    public double spacing_row_mm, spacing_column_mm;
    public long seq, t_source_ns, t_recv_ns;
}

[StructLayout(LayoutKind.Sequential)]
struct Options { public uint struct_size, abi; public IntPtr target, precision, engine_folder; }

[StructLayout(LayoutKind.Sequential)]
struct Reading
{
    public uint struct_size; public int valid, verified, degraded;
    public long seq, t_recv_ns;
    public double age_ms, preprocess_ms, infer_ms, postprocess_ms, total_ms;
    public IntPtr mask; public int mask_rows, mask_columns;
    public IntPtr scores; public int score_count, exit_index;
    [MarshalAs(UnmanagedType.ByValArray, SizeConst = 4)] public int[] crop;
    [MarshalAs(UnmanagedType.ByValArray, SizeConst = 4)] public int[] box;
    public int frame_rows, frame_columns;
    public double spacing_row_mm, spacing_column_mm;
    public int measured, found;
    public double hc_mm;
}

static class Predict
{
    const string Library = "tinyusfm";
    [DllImport(Library)] static extern void tusfm_frame_init(ref Frame frame, UIntPtr size);
    [DllImport(Library)] static extern void tusfm_options_init(ref Options options, UIntPtr size);
    [DllImport(Library)] static extern void tusfm_reading_init(ref Reading reading, UIntPtr size);
    [DllImport(Library)] static extern IntPtr tusfm_open(byte[] folder, ref Options options, out IntPtr session);
    [DllImport(Library)] static extern IntPtr tusfm_predict(IntPtr session, ref Frame frame, ref Reading reading);
    [DllImport(Library)] static extern IntPtr tusfm_status_text(IntPtr status);
    [DllImport(Library)] static extern void tusfm_close(IntPtr session);

    static UIntPtr SizeOf<T>() { return (UIntPtr)Marshal.SizeOf(typeof(T)); }

    static void Check(IntPtr status)
    {
        if (status != IntPtr.Zero) throw new InvalidOperationException(Marshal.PtrToStringAnsi(tusfm_status_text(status)));
    }

    static int Main(string[] words)
    {
        if (words.Length < 4) { Console.Error.WriteLine("usage: Predict BUNDLE IMAGE.pgm ROW_MM COLUMN_MM [ENGINES]"); return 2; }
        Frame frame = new Frame(); Options options = new Options(); Reading reading = new Reading { crop = new int[4], box = new int[4] };
        tusfm_frame_init(ref frame, SizeOf<Frame>());
        tusfm_options_init(ref options, SizeOf<Options>());
        tusfm_reading_init(ref reading, SizeOf<Reading>());
        byte[] file = File.ReadAllBytes(words[1]); // P5 COLUMNS ROWS 255, then the pixels
        string[] head = Encoding.ASCII.GetString(file, 0, Math.Min(64, file.Length)).Split(new[] { ' ', '\n' }, 5);
        frame.columns = int.Parse(head[1]); frame.rows = int.Parse(head[2]);
        GCHandle pinned = GCHandle.Alloc(file, GCHandleType.Pinned);
        frame.pixels = IntPtr.Add(pinned.AddrOfPinnedObject(), file.Length - frame.rows * frame.columns);
        frame.spacing_row_mm = double.Parse(words[2]); frame.spacing_column_mm = double.Parse(words[3]);
        if (words.Length > 4) options.engine_folder = Marshal.StringToHGlobalAnsi(words[4]);
        IntPtr session = IntPtr.Zero;
        try
        {
            Check(tusfm_open(Encoding.UTF8.GetBytes(words[0] + "\0"), ref options, out session));
            Check(tusfm_predict(session, ref frame, ref reading));
            Console.WriteLine("found {0}, HC {1:F2} mm", reading.found, reading.hc_mm);
            return 0;
        }
        catch (InvalidOperationException error) { Console.Error.WriteLine(error.Message); return 1; }
        finally { tusfm_close(session); pinned.Free(); }
    }
}
